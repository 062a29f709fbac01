-- slots_freed
-- Tells other replicas what became of tasks of workers that have a stream with slots there, in pairs of
-- worker and task; `+` before a task that came in the place of another. Both pairs of such a call are in one
-- notification: whoever heard of one alone would think the slot free. Of all others nothing is said: no NOTIFY, and
-- so no lock of the whole cluster. Two pairs are 335 bytes at most, and Postgres refuses payloads of 8,000.
select pg_notify('taskwire', 'slots ' || told.hints)
  from (select string_agg(hint, ' ' order by n) as hints
          from (select a.hint, a.n, (row_number() over (order by a.n) - 1) / 22 as chunk
                  from unnest($1::text[], $2::text[]) with ordinality as a (worker_id, hint, n)
                 -- `offset 0`: looks each worker up, however few of them are said to have slots.
                 cross join lateral (
                        select from streams s
                         where s.worker_id = a.worker_id
                           and s.slots is not null
                           and s.replica_id <> $3
                        offset 0) as elsewhere) as hints
         group by chunk) as told
