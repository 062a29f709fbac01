-- task_claim: explain
-- Why a claim got nothing. It only explains what task_claim decided, so it may race.
select a.n as "n!",
       t.status as "status: Status", t.claimed_by, t.claim_epoch as "claim_epoch?",
       coalesce(t.status = 'running' and t.claimed_by = a.worker_id and t.claim_id = a.claim_id, false) as "is_repeat!",
       w.id is not null as "worker_known!",
       coalesce(task_is_for(t.codebase_id, t.required_capabilities, t.target_worker_id, t.target_agent_name,
                            w.id, w.name, w.codebases, w.capabilities), false) as "routed!",
       coalesce(t.run_at <= now(), false) as "due!",
       coalesce(t.expires_at <= now(), false) as "expired!",
       past.outcome as "outcome?"
  from unnest($1::uuid[], $2::text[], $3::uuid[]) with ordinality as a (task_id, worker_id, claim_id, n)
  left join tasks t on t.id = a.task_id
  left join workers w on w.id = a.worker_id
  left join lateral (
        select p.outcome
          from attempts p
         where p.task_id = t.id and p.worker_id = a.worker_id and p.claim_id = a.claim_id
         order by p.claim_epoch desc
         limit 1) as past on true
