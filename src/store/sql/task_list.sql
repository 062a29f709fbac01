-- task_list
-- One page, newest first. The large columns stay behind: one task's whole is task_get's.
select t.id as "id: _", t.title, t.status as "status: _", t.codebase_id, t.priority, t.required_capabilities,
       t.target_worker_id, t.target_agent_name, t.agent_type, t.attempt, t.max_attempts,
       t.timeout_seconds, t.claim_epoch, t.claimed_by, t.created_at, t.run_at, t.expires_at, t.claimed_at,
       t.finished_at, left(t.error, 1000) as error, t.cancel_requested_at, t.cancel_reason,
       h.progress, left(h.message, 1000) as message
  from tasks t
  left join heartbeats h on h.task_id = t.id and h.claim_epoch = t.claim_epoch and t.status <> 'pending'
 where ($1::text is null or t.status = $1)
   and ($2::text is null or t.codebase_id = $2)
   and ($3::text is null or t.claimed_by = $3)
   and ($4::timestamptz is null or t.created_at > $4)
   and ($5::timestamptz is null or t.created_at < $5)
   and ($6::timestamptz is null or (t.created_at, t.id) < ($6, $7::uuid))
 order by t.created_at desc, t.id desc
 limit $8
