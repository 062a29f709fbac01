-- task_finish: explain
-- Where a task stands whose finish matched nothing. It only explains, so it may race.
select t.id as "id: TaskId", t.status as "status: Status", t.claimed_by, t.claim_epoch, t.attempt, t.max_attempts
  from tasks t
 where t.id = any ($1)
