-- slots_tasks
-- Those of some tasks that a worker holds now, whole, best first: they are pushed to it again.
select t.id as "id: _", t.title, t.status as "status: _", t.codebase_id, t.priority, t.required_capabilities,
       t.target_worker_id, t.target_agent_name, t.agent_type, t.prompt, t.metadata as "metadata!: Lenient", t.attempt, t.max_attempts,
       t.timeout_seconds, t.claim_epoch, t.claimed_by, t.created_at, t.run_at, t.expires_at, t.claimed_at,
       t.finished_at, t.result, t.error, t.cancel_requested_at, t.cancel_reason,
       h.progress, h.message, c.checkpoint
  from tasks t
  left join heartbeats h on h.task_id = t.id and h.claim_epoch = t.claim_epoch
  left join heartbeats c on c.task_id = t.id
 where t.id = any ($2)
   and t.lease_expires_at is not null
   and t.claimed_by = $1
 order by t.priority desc, t.created_at, t.id
