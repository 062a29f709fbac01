-- replica_heartbeat
-- One write vouches for all streams of the replica. True: the row was not there, so it is the first
-- one, or the others had given this replica up, and with it the presence of its streams.
insert into replicas as r (id, address, version)
values ($1, $2, $3)
    on conflict (id) do update set last_seen_at = now()
returning (xmax = 0) as "is_new!"
