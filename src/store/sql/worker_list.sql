-- worker_list
-- Workers by id, with what is known of their liveness. Connected is who has a stream on a live
-- replica, or called within the timeout ($2 seconds) and since its last stream ended.
select w.id as "id!: WorkerId", w.name as "name!", w.codebases as "codebases!", w.capabilities as "capabilities!",
       w.hostname, w.metadata as "metadata!", w.registered_at as "registered_at!",
       s.connection_id as "connection_id?: ConnectionId", s.replica_id as "replica_id?: ReplicaId",
       r.address as "replica_address?", s.connected_at as "connected_at?",
       greatest(w.last_seen_at, w.stream_ended_at, s.connected_at, r.last_seen_at) as "last_heartbeat!",
       s.connection_id is not null
           or (w.last_seen_at > coalesce(w.stream_ended_at, '-infinity')
               and w.last_seen_at > now() - make_interval(secs => $2)) as "connected!"
  from workers w
  left join (streams s join replicas r on r.id = s.replica_id and r.last_seen_at > now() - make_interval(secs => $3))
    on s.worker_id = w.id
 where ($1::text is null or w.id = $1)
   and (not $4 or s.connection_id is not null
        or (w.last_seen_at > coalesce(w.stream_ended_at, '-infinity')
            and w.last_seen_at > now() - make_interval(secs => $2)))
 order by w.id
