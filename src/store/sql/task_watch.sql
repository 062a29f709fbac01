-- task_watch
-- Where some tasks stand, for those who follow them. What is large is read once, when a task has ended.
select t.id as "id!: TaskId", t.status as "status!: Status", t.attempt as "attempt!", t.max_attempts as "max_attempts!",
       t.claim_epoch as "claim_epoch!", t.claimed_by, t.run_at as "run_at!", left(t.error, 1000) as error,
       t.cancel_requested_at is not null as "cancel_requested!",
       h.progress, h.message
  from tasks t
  left join heartbeats h on h.task_id = t.id and h.claim_epoch = t.claim_epoch and t.status <> 'pending'
 where t.id = any ($1)
