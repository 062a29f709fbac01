-- task_late
-- Where the tasks of calls stand whose fence matched nothing, and how the claim ended that each call
-- is of. A call that comes too late leaves its mark on that attempt, for operators; a `complete` that
-- only repeats what was done is not late. It only explains, so it may race.
with asked as (
    select * from unnest($1::uuid[], $2::text[], $3::bigint[], $4::boolean[])
        with ordinality as a (task_id, worker_id, claim_epoch, completes, n)
), past as materialized (
    select a.n, p.task_id, p.claim_epoch, p.attempt, p.outcome,
           a.completes and p.outcome = 'completed' and not p.revoked as repeats
      from asked a
      left join tasks t on t.id = a.task_id and t.lease_expires_at is not null and t.claimed_by = a.worker_id
     cross join lateral (
            select * from attempts
             where task_id = a.task_id
               and worker_id = a.worker_id
               and (claim_epoch = a.claim_epoch
                    or a.claim_epoch is null and t.id is null)  -- who holds the task means that claim
             order by claim_epoch desc
             limit 1) as p
), late as (
    select task_id, claim_epoch, count(*) as calls from past where not repeats group by task_id, claim_epoch
), locked as materialized (
    select a.task_id, a.claim_epoch, late.calls
      from attempts a
      join late on late.task_id = a.task_id and late.claim_epoch = a.claim_epoch
     order by a.task_id, a.claim_epoch
       for no key update of a
), counted as (
    update attempts a
       set late_calls = a.late_calls + locked.calls
      from locked
     where a.task_id = locked.task_id and a.claim_epoch = locked.claim_epoch
)
select a.n as "n!", t.status as "status?: Status", t.claimed_by, t.claim_epoch as "claim_epoch?",
       t.max_attempts as "max_attempts?",
       coalesce(past.claim_epoch, t.claim_epoch) as "past_epoch?", coalesce(past.attempt, t.attempt) as "past_attempt?",
       past.outcome as "outcome?",
       -- A task that was completed before there were attempts left no row of them.
       coalesce(past.repeats, a.completes and t.status = 'completed' and t.claimed_by = a.worker_id
                              and t.claim_epoch = coalesce(a.claim_epoch, t.claim_epoch), false) as "repeats!",
       coalesce(t.lease_expires_at is not null and t.claimed_by = a.worker_id
                and t.claim_epoch = coalesce(a.claim_epoch, t.claim_epoch), false) as "holds!"
  from asked a
  left join tasks t on t.id = a.task_id
  left join past on past.n = a.n
