-- task_claim
-- Decides races by itself: a row is locked before it is changed, and only an unclaimed row matches.
-- Many claims share the statement. A row that someone else is changing this moment is skipped, not
-- waited for: its claim is lost, and no lock of one task holds up the claims of others.
with asked as (
    select * from unnest($1::uuid[], $2::text[], $3::uuid[]) with ordinality as a (task_id, worker_id, claim_id, n)
), candidates as materialized (
    select t.id, a.n, a.worker_id, a.claim_id
      from asked a
      join workers w on w.id = a.worker_id
      -- Looked up one by one, and locked in the same breath.
     cross join lateral (
            select tasks.id
              from tasks
             where tasks.id = a.task_id
               and tasks.claimed_by is null
               and tasks.status = 'pending'
               and tasks.run_at <= now()
               and (tasks.expires_at is null or tasks.expires_at > now())
               and task_is_for(tasks.codebase_id, tasks.required_capabilities, tasks.target_worker_id,
                               tasks.target_agent_name, w.id, w.name, w.codebases, w.capabilities)
               -- A claim_id is good for one claim: a call that was long on its way must not make another.
               and (a.claim_id is null or tasks.claim_epoch = 0
                    or not exists (select 1 from attempts p
                                    where p.task_id = tasks.id and p.worker_id = a.worker_id and p.claim_id = a.claim_id))
               for no key update skip locked) as t  -- nobody waits here, so nobody can wait for each other
), winners as (
    select distinct on (id) id, n, worker_id, claim_id from candidates order by id, n
), winning as (
    select winners.*, h.checkpoint from winners left join heartbeats h on h.task_id = winners.id
)
update tasks t
   set status           = 'running',
       claimed_by       = winning.worker_id,
       claim_id         = winning.claim_id,
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
