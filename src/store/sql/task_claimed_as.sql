-- task_claimed_as
-- What a worker claimed with a claim_id and still has, of one task or of all: the answer to a repeated
-- call. Whose claim it is stands in the same `where` that reads it: in between it may pass to another.
select t.id as "id: _", t.title, t.status as "status: _", t.codebase_id, t.priority, t.required_capabilities,
       t.target_worker_id, t.target_agent_name, t.agent_type, t.prompt, t.metadata as "metadata!: Lenient", t.attempt, t.max_attempts,
       t.timeout_seconds, t.claim_epoch, t.claimed_by, t.created_at, t.run_at, t.expires_at, t.claimed_at,
       t.finished_at, t.result, t.error, t.cancel_requested_at, t.cancel_reason,
       h.progress, h.message, c.checkpoint
  from tasks t
  left join heartbeats h on h.task_id = t.id and h.claim_epoch = t.claim_epoch
  left join heartbeats c on c.task_id = t.id
 where t.claimed_by = $1
   and t.status = 'running'
   and t.claim_id = $2
   and ($3::uuid is null or t.id = $3)
