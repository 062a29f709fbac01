-- push_backlog_shared
-- The best $3 claimable tasks for each of some ways to be routed, best first, as push_backlog gives them to
-- one worker: many streams that are routed alike read one backlog. Codebases and capabilities are lists with
-- commas. What is for one worker or name alone is among them, whoever it is for: each stream takes out what
-- is not for its own.
--
-- Two veils keep the planner from sorting whole codebases: `limit (select …)` hides how much is wanted, and `case`
-- hides the predicate, which would look as if next to nothing passed it (and offers an `or` for a bitmap).
select a.n as "n!", t.id as "id!: TaskId", t.title as "title!", t.codebase_id as "codebase_id!", t.priority as "priority!",
       t.required_capabilities as "required_capabilities!", t.target_worker_id, t.target_agent_name, t.agent_type,
       case when l.is_large then null else t.prompt end as prompt,
       case when l.is_large then null else t.metadata end as "metadata?: Lenient",
       case when l.is_large then null else t.error end as error,
       case when l.is_large then null else h.checkpoint end as checkpoint,
       t.attempt as "attempt!", t.max_attempts as "max_attempts!", t.timeout_seconds, t.claim_epoch as "claim_epoch!",
       t.created_at as "created_at!", t.run_at as "run_at!", t.expires_at, l.is_large as "is_large!",
       t.ready_xid as "ready_xid!"
  from (select r.n, string_to_array(r.codebases, ',') as codebases, string_to_array(r.capabilities, ',') as capabilities
          from unnest($1::text[], $2::text[]) with ordinality as r (codebases, capabilities, n)
        offset 0) as a
 cross join lateral (
        select best.*
          from (select distinct codebase_id
                  from unnest(array['global', '__pending__'] || a.codebases) as own (codebase_id)) as own
         cross join lateral (
                select tasks.*
                  from tasks
                 where tasks.status = 'pending'
                   and tasks.due
                   and tasks.codebase_id = own.codebase_id
                   and (tasks.expires_at is null or tasks.expires_at > now())
                   and case when task_is_for(tasks.codebase_id, tasks.required_capabilities, null, null,
                                             null, null, a.codebases, a.capabilities)
                            then true end
                 order by tasks.priority desc, tasks.created_at, tasks.id
                 limit (select $3::bigint)) as best
         order by best.priority desc, best.created_at, best.id
         limit (select $3::bigint)) as t
  left join heartbeats h on h.task_id = t.id
 cross join lateral (
        -- After the limits: jsonb is stored packed, so its text has to be made to be measured.
        select coalesce(octet_length(t.prompt), 0) + coalesce(octet_length(t.error), 0)
                   + octet_length(t.metadata::text)
                   + coalesce(octet_length(h.checkpoint::text), 0) > 12288 as is_large) as l
 order by a.n, t.priority desc, t.created_at, t.id
