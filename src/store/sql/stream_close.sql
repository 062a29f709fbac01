-- stream_close
-- Ends the presence of some connections. By connection, never by worker: a newer stream of the same
-- worker has another id and is not touched.
with ended as (
    delete from streams where connection_id = any ($1) and replica_id = $2 returning worker_id
)
update workers w
   set stream_ended_at = now()
  from ended
 where w.id = ended.worker_id
