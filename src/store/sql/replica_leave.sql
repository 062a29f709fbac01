-- replica_leave
-- A replica says farewell, or ($2 seconds of silence) the others bury it. Its streams end with it.
with gone as (
    select id, last_seen_at from replicas
     where id = $1 or last_seen_at < now() - make_interval(secs => $2)
       for update skip locked
), ended as (
    update workers w
       set stream_ended_at = greatest(gone.last_seen_at, s.connected_at, w.last_seen_at, w.stream_ended_at)
      from streams s
      join gone on gone.id = s.replica_id
     where w.id = s.worker_id
)
delete from replicas r using gone where r.id = gone.id
