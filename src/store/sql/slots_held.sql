-- slots_held
-- Which claims some workers hold now, at most $2 of each: the truth that streams with slots are compared with.
select a.n as "n!", t.id as "task_id!: TaskId", t.claim_epoch as "claim_epoch!", t.claim_id
  from unnest($1::text[]) with ordinality as a (worker_id, n)
 cross join lateral (
        select tasks.id, tasks.claim_epoch, tasks.claim_id
          from tasks
         where tasks.claimed_by = a.worker_id
           and tasks.status = 'running'
         limit (select $2::bigint)) as t
