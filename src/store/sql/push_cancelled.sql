-- push_cancelled
-- Whom to tell that a running task is to be stopped, and why: of some tasks, or of what some workers
-- hold, who may have been away when it was said.
select id as "id!: TaskId", claimed_by as "claimed_by!", cancel_reason
  from tasks
 where id = any ($1)
   and claimed_by is not null
   and (cancel_requested_at is not null or status = 'cancelled')
 union
select id, claimed_by, cancel_reason
  from tasks
 where claimed_by = any ($2)
   and status = 'running'
   and cancel_requested_at is not null
