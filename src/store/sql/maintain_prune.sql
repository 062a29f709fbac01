-- maintain_prune
-- Forgets finished tasks after the retention ($2 days), in small batches.
-- (`limit (select …)` hides the number: the planner would otherwise read and sort all that there is whenever it
-- takes that for little.)
with old as materialized (
    select id from tasks
     where finished_at < now() - make_interval(days => $2)
     order by finished_at
     limit (select $1::bigint)
       for update skip locked
)
delete from tasks where id = any (array(select id from old))
