-- replica_place
-- Where the streams of a replica stand in the row of all streams, replica by replica in the order of their
-- ids: how many are before it, its own, and all. Without those of replicas that have been silent for $2 s, and
-- without those with slots, which are told of nothing.
select coalesce(sum(streams) filter (where id < $1), 0)::bigint as "before!",
       coalesce(sum(streams) filter (where id = $1), 0)::bigint as "own!",
       coalesce(sum(streams), 0)::bigint as "all!"
  from (select r.id, count(*) as streams
          from replicas r
          join streams s on s.replica_id = r.id and s.slots is null
         where r.last_seen_at > now() - make_interval(secs => $2)
         group by r.id) as living
