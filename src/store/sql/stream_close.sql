-- stream_close
-- Ends the presence of some connections. By connection, never by worker alone: a newer stream of the
-- same worker has another id and is not touched. Workers are locked first and in the order of their
-- ids, here as in every statement that locks several.
with mine as materialized (
    select w.id, a.connection_id
      from unnest($1::text[], $2::uuid[]) as a (worker_id, connection_id)
      join workers w on w.id = a.worker_id
     order by w.id
       for no key update of w
), ended as (
    delete from streams s
     using mine
     where s.worker_id = mine.id and s.connection_id = mine.connection_id
    returning s.worker_id
)
update workers w
   set stream_ended_at = now()
  from ended
 where w.id = ended.worker_id
