-- push_cancelled
-- Whom to tell that it is to stop, and why: the owners of running tasks whose cancellation was asked for,
-- of some tasks ($1) or of what some workers hold ($2), who may have been away when it was said; and whose
-- claim of some tasks was the last one and was revoked.
select id as "id!: TaskId", claimed_by as "claimed_by!", claim_epoch as "claim_epoch!", cancel_reason
  from tasks
 where id = any ($1)
   and status = 'running'
   and cancel_requested_at is not null
 union
select id, claimed_by, claim_epoch, cancel_reason
  from tasks
 where claimed_by = any ($2)
   and status = 'running'
   and cancel_requested_at is not null
 union
select t.id, a.worker_id, a.claim_epoch,
       case a.outcome when 'requeued' then 'it was requeued' when 'cancelled' then t.cancel_reason
                      when 'timed_out' then a.error else 'it was ended by hand' end
  from tasks t
 cross join lateral (
        select * from attempts where task_id = t.id order by claim_epoch desc limit 1) as a
 where t.id = any ($1)
   and a.revoked
   and not (t.status = 'running' and t.claimed_by = a.worker_id)
