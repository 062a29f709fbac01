-- slots_check
-- Which of some tasks each worker still holds, and by which claim. (`lease_expires_at is not null` is
-- `status = 'running'` in words that fit no partial index, as in task_finish.)
select a.n as "n!", t.claim_epoch, t.claim_id
  from unnest($1::text[], $2::uuid[]) with ordinality as a (worker_id, task_id, n)
  join tasks t on t.id = a.task_id
 where t.lease_expires_at is not null
   and t.claimed_by = a.worker_id
