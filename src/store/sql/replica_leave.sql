-- replica_leave
-- A replica says farewell, or ($2 seconds of silence) the others bury it. Its streams end with it.
with gone as materialized (
    select id, last_seen_at from replicas
     where id = $1 or last_seen_at < now() - make_interval(secs => $2)
       for update skip locked
), orphans as materialized (
    select w.id, greatest(gone.last_seen_at, s.connected_at, w.last_seen_at, w.stream_ended_at) as ended_at
      from gone
      join streams s on s.replica_id = gone.id
      join workers w on w.id = s.worker_id
     order by w.id
       for no key update of w
), ended as (
    update workers w set stream_ended_at = orphans.ended_at from orphans where w.id = orphans.id
)
delete from replicas r using gone where r.id = gone.id
