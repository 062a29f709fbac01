-- task_claim_next
-- Claims the best tasks for one worker: up to $2 of them, best first, by the predicate and in the order
-- of push_backlog, with the same veils before the planner. Rows that rivals have locked or won meanwhile are passed over, so more candidates
-- ($5) are read than wanted. $3: with a claim_id, only its first call claims. $4: the lease. $6: bytes of
-- the tasks together; the first one comes whatever its size.
with me as materialized (
    select w.id, w.name, w.codebases, w.capabilities from workers w where w.id = $1 and claim_is_first($1, $3)
), best as materialized (
    select t.id, t.priority, t.created_at,
           t.bytes
      from me
     cross join lateral (
            select best.*
              from (select distinct codebase_id
                      from unnest(array['global', '__pending__'] || me.codebases) as own (codebase_id)) as own
             cross join lateral (
                    select tasks.id, tasks.priority, tasks.created_at,
                           coalesce(octet_length(tasks.prompt), 0) + pg_column_size(tasks.metadata) as bytes
                      from tasks
                     where tasks.status = 'pending'
                       and tasks.due
                       and tasks.run_at <= now()
                       and tasks.codebase_id = own.codebase_id
                       and (tasks.expires_at is null or tasks.expires_at > now())
                       and case when task_is_for(tasks.codebase_id, tasks.required_capabilities, tasks.target_worker_id,
                                                 tasks.target_agent_name, me.id, me.name, me.codebases, me.capabilities)
                                then true end
                     order by tasks.priority desc, tasks.created_at, tasks.id
                     limit (select $5::bigint)) as best
             order by best.priority desc, best.created_at, best.id
             limit (select $5::bigint)) as t
), chosen as materialized (
    select t.id, best.priority, best.created_at, best.bytes
      from best
      -- Looked up and locked one by one, best first, until there are enough: no others.
     cross join lateral (
            select tasks.id
              from tasks
             where tasks.id = best.id
               and tasks.claimed_by is null
               and tasks.status = 'pending'
               and tasks.run_at <= now()
               and (tasks.expires_at is null or tasks.expires_at > now())
               for no key update skip locked) as t
     limit $2
), measured as (
    select id, sum(bytes) over (order by priority desc, created_at, id) - bytes as bytes_before from chosen
), winning as (
    select m.id, h.checkpoint
      from measured m
      left join heartbeats h on h.task_id = m.id
     where m.bytes_before <= $6::bigint
)
update tasks t
   set status           = 'running',
       claimed_by       = $1,
       claim_id         = $3,
       claim_outcome    = null,
       claimed_at       = now(),
       claim_epoch      = t.claim_epoch + 1,
       attempt          = t.attempt + 1,
       lease_expires_at = now() + make_interval(secs => least($4::double precision, t.timeout_seconds))
  from winning
 where t.id = winning.id
   and t.claimed_by is null
   and t.status = 'pending'
returning t.id as "id: _", t.title, t.status as "status: _", t.codebase_id, t.priority, t.required_capabilities,
       t.target_worker_id, t.target_agent_name, t.agent_type, t.prompt, t.metadata as "metadata!: Lenient", t.attempt, t.max_attempts,
       t.timeout_seconds, t.claim_epoch, t.claimed_by, t.created_at, t.run_at, t.expires_at, t.claimed_at,
       t.finished_at, t.result, t.error, t.cancel_requested_at, t.cancel_reason,
       null::double precision as progress, null::text as message, winning.checkpoint
