-- task_attempts
-- The claims of one task, newest first: the running one and those that ended.
select claim_epoch as "claim_epoch!", attempt as "attempt!", worker_id as "worker_id!", started_at as "started_at!",
       ended_at, outcome, error, late_calls as "late_calls!"
  from attempt_history
 where task_id = $1
 order by claim_epoch desc
 limit $2
