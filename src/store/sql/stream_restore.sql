-- stream_restore
-- Presence of streams that live here but have no row: this replica was silent for so long that the
-- others had buried it. A worker that is connected elsewhere by now is left alone.
insert into streams (worker_id, connection_id, replica_id, slots)
select a.worker_id, a.connection_id, $3, a.slots
  from unnest($1::text[], $2::uuid[], $4::integer[]) as a (worker_id, connection_id, slots)
  join workers w on w.id = a.worker_id
 order by a.worker_id
    on conflict (worker_id) do nothing
