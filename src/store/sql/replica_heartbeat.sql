-- replica_heartbeat
-- One write vouches for all streams of the replica. True: the row was not there, so it is the first
-- one, or the others had given this replica up, and with it the presence of its streams. After a silence of $4 s it is steady only from now on.
insert into replicas as r (id, address, version)
values ($1, $2, $3)
    on conflict (id) do update
   set steady_since = case when r.last_seen_at < now() - make_interval(secs => $4) then now() else r.steady_since end,
       last_seen_at = now()
returning (xmax = 0) as "is_new!"
