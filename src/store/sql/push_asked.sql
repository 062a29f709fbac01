-- push_asked
-- Which tasks some workers asked for last, and lost, on replicas where they have no stream, and how many
-- seconds ago: so far each has read its own stream.
select id as "worker_id!", asked_task_id as "task_id!: TaskId",
       greatest(extract(epoch from now() - asked_at)::double precision, 0) as "seconds_ago!"
  from workers
 where id = any ($1)
   and asked_task_id is not null
   and isfinite(asked_at)
