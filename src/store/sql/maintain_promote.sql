-- maintain_promote
-- Scheduled tasks whose time has come can be claimed from now on; the trigger announces them.
-- (`limit (select …)` hides the number: the planner would otherwise read and sort all that there is whenever it
-- takes that for little.)
with coming as materialized (
    select id from tasks
     where status = 'pending' and not due and run_at <= now()
     order by run_at
     limit (select $1::bigint)
       for no key update skip locked
)
update tasks t set due = true from coming where t.id = coming.id
