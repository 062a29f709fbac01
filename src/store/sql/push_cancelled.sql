-- push_cancelled
-- Whom to tell that a running task is to be stopped, and why.
select id as "id: TaskId", claimed_by as "claimed_by!", cancel_reason
  from tasks
 where id = any ($1)
   and claimed_by is not null
   and (cancel_requested_at is not null or status = 'cancelled')
