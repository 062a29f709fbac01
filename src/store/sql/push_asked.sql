-- push_asked
-- What some workers asked for last on replicas where they have no stream, and how many seconds ago: so far
-- each has read its own stream. A task that was lost; null: whatever was best.
select id as "worker_id!", asked_task_id as "task_id?: TaskId",
       greatest(extract(epoch from now() - asked_at)::double precision, 0) as "seconds_ago!"
  from workers
 where id = any ($1)
   and isfinite(asked_at)
