-- slots_elsewhere
-- Which of some workers have a newer stream with slots than the connection that ended: what the older one
-- did not get rid of is pushed there.
select a.n as "n!"
  from unnest($1::text[], $2::uuid[]) with ordinality as a (worker_id, connection_id, n)
 cross join lateral (
        select from streams s
         where s.worker_id = a.worker_id
           and s.slots is not null
           and s.connection_id <> a.connection_id
        offset 0) as newer
