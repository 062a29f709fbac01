-- maintain_prune
-- Forgets finished tasks after the retention ($2 days), in small batches.
with old as materialized (
    select id from tasks
     where finished_at < now() - make_interval(days => $2)
     order by finished_at
     limit $1
       for update skip locked
)
delete from tasks where id = any (array(select id from old))
