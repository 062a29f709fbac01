-- task_cancel
-- A pending task ends at once. A running one is marked, and the trigger tells its owner.
with target as materialized (
    select id, status from tasks where id = $1 for no key update
)
update tasks t
   set status              = case when target.status = 'pending' then 'cancelled' else t.status end,
       finished_at         = case when target.status = 'pending' then now() else t.finished_at end,
       cancel_requested_at = coalesce(t.cancel_requested_at, now()),
       cancel_reason       = coalesce(t.cancel_reason, $2)
  from target
 where t.id = target.id
   and target.status in ('pending', 'running')
returning t.status as "status: Status"
