-- maintain_expire
-- Ends pending tasks that nobody claimed before their expires_at.
-- (`limit (select …)` hides the number: the planner would otherwise read and sort all that there is whenever it
-- takes that for little.)
with late as materialized (
    select id from tasks
     where status = 'pending' and expires_at <= now()
     order by expires_at
     limit (select $1::bigint)
       for no key update skip locked
)
update tasks t
   set status = 'failed', finished_at = now(),
       error = case when t.attempt = 0 then 'expired before it was claimed'
                    else 'expired before it was claimed again: ' || coalesce(t.error, 'attempt ' || t.attempt || ' gave no reason') end
  from late
 where t.id = late.id
