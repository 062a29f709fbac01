-- replica_heartbeat
-- One write vouches for all streams of the replica. True: the row was not there, so it is the first
-- one, or the others had given this replica up, and with it the presence of its streams.
--
-- steady_since is when the last gap ended in which no replica showed a sign of life for $4 s, as in an
-- outage: who joins or wakes up among others that live takes theirs over. `least`, for a clock that
-- was set back.
with others as (
    select min(steady_since) as steady_since
      from replicas
     where id <> $1
       and last_seen_at > now() - make_interval(secs => $4)
)
insert into replicas as r (id, address, version, steady_since)
select $1, $2, $3, coalesce(least(others.steady_since, now()), now()) from others
    on conflict (id) do update
   set steady_since = case when r.last_seen_at < now() - make_interval(secs => $4) then excluded.steady_since
                           else least(r.steady_since, now()) end,
       last_seen_at = now()
returning (xmax = 0) as "is_new!"
