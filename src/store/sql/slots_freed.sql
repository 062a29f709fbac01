-- slots_freed
-- Tells other replicas what became of tasks of workers that have a stream with slots there, in pairs of
-- worker and task; `+` before a task that came in the place of another. Of all others nothing is said: no NOTIFY, and so no lock of the whole cluster. A pair is 167
-- bytes at most, and Postgres refuses payloads of 8,000.
select pg_notify('taskwire', 'slots ' || told.pairs)
  from (select string_agg(pair, ' ') as pairs
          from (select a.worker_id || ' ' || a.task_id as pair, (row_number() over () - 1) / 45 as chunk
                  from unnest($1::text[], $2::text[]) as a (worker_id, task_id)
                 -- `offset 0`: looks each worker up, however few of them are said to have slots.
                 cross join lateral (
                        select from streams s
                         where s.worker_id = a.worker_id
                           and s.slots is not null
                           and s.replica_id <> $3
                        offset 0) as elsewhere) as pairs
         group by chunk) as told
