-- push_still_claimable
-- Which of some announced tasks are still there to be claimed, and who claimed those that are not.
select id as "id: TaskId", ready_xid, claimed_by
  from tasks
 where id = any ($1)
   and (status <> 'pending'
        or run_at <= now() and (expires_at is null or expires_at > now()))
   and (status = 'pending' or claimed_by is not null)
