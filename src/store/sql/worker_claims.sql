-- worker_claims
-- Which of some workers hold a claim, which their streams keep alive; and how many seconds ago each asked
-- for whatever was best where it has no stream.
with holding as materialized (
    select distinct claimed_by
      from tasks
     where claimed_by = any ($1)
       and status = 'running'
)
select w.id as "worker_id!",
       exists (select 1 from holding h where h.claimed_by = w.id) as "holds_any!",
       case when w.asked_task_id is null and isfinite(w.asked_at)
            then greatest(extract(epoch from now() - w.asked_at)::double precision, 0) end as asked_seconds_ago
  from unnest($1::text[]) as a (worker_id)
  join workers w on w.id = a.worker_id
