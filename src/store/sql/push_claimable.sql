-- push_claimable
-- Those of some tasks that can be claimed now, as they are pushed: the large columns of a task that
-- would not fit into a frame stay behind.
select 0::bigint as "n!", t.id as "id!: TaskId", t.title as "title!", t.codebase_id as "codebase_id!", t.priority as "priority!",
       t.required_capabilities as "required_capabilities!", t.target_worker_id, t.target_agent_name, t.agent_type,
       case when l.is_large then null else t.prompt end as prompt,
       case when l.is_large then null else t.metadata end as "metadata?: Lenient",
       case when l.is_large then null else t.error end as error,
       case when l.is_large then null else h.checkpoint end as checkpoint,
       t.attempt as "attempt!", t.max_attempts as "max_attempts!", t.timeout_seconds, t.claim_epoch as "claim_epoch!",
       t.created_at as "created_at!", t.run_at as "run_at!", t.expires_at, l.is_large as "is_large!",
       t.ready_xid as "ready_xid!"
  from (select tasks.*
          from tasks
         where id = any ($1)
           and status = 'pending'
           and run_at <= now()
           and (expires_at is null or expires_at > now())) as t
  left join heartbeats h on h.task_id = t.id
 cross join lateral (
        -- After the limits: jsonb is stored packed, so its text has to be made to be measured.
        select coalesce(octet_length(t.prompt), 0) + coalesce(octet_length(t.error), 0)
                   + octet_length(t.metadata::text)
                   + coalesce(octet_length(h.checkpoint::text), 0) > 12288 as is_large) as l
 order by t.priority desc, t.created_at, t.id
