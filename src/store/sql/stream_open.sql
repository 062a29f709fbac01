-- stream_open
-- Connects some workers: registers whom nobody knows, takes over what a worker's headers say, and
-- makes this connection the worker's one stream. An older stream loses its row here, and the
-- trigger tells its replica. $6 is the replica, $7 the slots. Null in a list means: not given.
with asked as (
    select worker_id, name,
           string_to_array(codebases, ',') as codebases,
           string_to_array(capabilities, ',') as capabilities, connection_id, slots, n
      from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::uuid[], $7::integer[]) with ordinality
        as a (worker_id, name, codebases, capabilities, connection_id, slots, n)
), latest as (  -- the same worker twice in one batch: the later one is the newer stream
    select distinct on (worker_id) * from asked order by worker_id, n desc
), known as (
    insert into workers as w (id, name, codebases, capabilities)
    select worker_id, coalesce(name, worker_id), coalesce(codebases, '{}'), coalesce(capabilities, '{}')
      from latest
     order by worker_id
        on conflict (id) do update
       set (name, codebases, capabilities) = (
               select coalesce(l.name, w.name), coalesce(l.codebases, w.codebases), coalesce(l.capabilities, w.capabilities)
                 from latest l
                where l.worker_id = w.id)
    returning w.id, w.name, w.codebases, w.capabilities
), present as (
    insert into streams as s (worker_id, connection_id, replica_id, slots)
    select l.worker_id, l.connection_id, $6, l.slots
      from known k
      join latest l on l.worker_id = k.id
     order by l.worker_id
        on conflict (worker_id) do update
       set connection_id = excluded.connection_id,
           replica_id    = excluded.replica_id,
           slots         = excluded.slots,
           connected_at  = now()
    returning s.worker_id
)
select k.id as "worker_id!: WorkerId", k.name as "name!", k.codebases as "codebases!", k.capabilities as "capabilities!"
  from known k
  join present p on p.worker_id = k.id
