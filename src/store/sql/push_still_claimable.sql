-- push_still_claimable
-- Which of some announced tasks are still there to be claimed.
select id as "id: TaskId", ready_xid
  from tasks
 where id = any ($1)
   and status = 'pending'
   and run_at <= now()
   and (expires_at is null or expires_at > now())
