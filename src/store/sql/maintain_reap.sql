-- maintain_reap
-- Looks at claims whose lease has run out. One that is still alive by the signs of life of its owner
-- keeps going: the lease moves on. Otherwise, or when timeout_seconds are over, the task is pending
-- again, or failed when its attempts are used up, or cancelled when that was asked for. Safe on every
-- replica at once: rows that another replica is reaping are skipped. Signs of life are looked up after
-- the row is locked, as claim_alive_until sees what was committed up to then: a heartbeat locks the row
-- too, so none that was acknowledged is overlooked.
--
-- After an outage or a step of the clock every sign of life looks old. So silence is not judged until the
-- replicas have been steady for a lease: by then everyone has had the time to show one.
-- $1 rows, $2 lease in seconds, $3 seconds without a sign of life after which a replica is not steady.
-- (`limit (select …)` hides the number: the planner would otherwise read and sort all that there is whenever it
-- takes that for little.)
with lapsed as materialized (
    select t.id, t.claim_epoch, t.claimed_by, t.attempt, t.max_attempts, t.cancel_requested_at,
           t.claimed_at + make_interval(secs => t.timeout_seconds) as times_out_at
      from tasks t
     where t.status = 'running'
       and t.lease_expires_at <= now()
       and (t.claimed_at + make_interval(secs => t.timeout_seconds) <= now()
            or exists (select 1
                         from replicas r
                        where r.last_seen_at > now() - make_interval(secs => $3)
                          and r.steady_since <= now() - make_interval(secs => $2)))
     order by t.lease_expires_at
     limit (select $1::bigint)
       for no key update of t skip locked
), seen as materialized (
    select l.*, claim_alive_until(l.id, l.claim_epoch, l.claimed_by, make_interval(secs => $2)) as alive_until
      from lapsed l
), judged as (
    select s.*,
           case when s.times_out_at <= now() then 'timed_out'
                when s.alive_until > now() then null
                else 'lapsed'
           end as claim_outcome
      from seen s
), decided as (
    select j.*,
           case when j.claim_outcome is null then 'running'
                when j.cancel_requested_at is not null then 'cancelled'
                when j.attempt < j.max_attempts then 'pending'
                else 'failed'
           end as status
      from judged j
)
update tasks t
   set status           = d.status,
       claim_outcome    = case when d.status = 'cancelled' then 'cancelled' else d.claim_outcome end,
       lease_expires_at = case when d.status = 'running'
                               -- A lease at most, however long the replica is trusted: the stream may end meanwhile.
                               then least(d.alive_until, d.times_out_at, now() + make_interval(secs => $2)) end,
       run_at           = case when d.status = 'pending' and d.claim_outcome = 'timed_out' then now() + retry_wait(d.attempt)
                               else t.run_at end,
       error            = case when d.claim_outcome is null then t.error
                               else case when d.status = 'failed' then 'gave up after ' || d.attempt || ' attempts: '
                                         else 'attempt ' || d.attempt || ': ' end
                                    || case d.claim_outcome
                                            when 'timed_out' then 'worker ' || d.claimed_by || ' took longer than ' || t.timeout_seconds || ' s'
                                            else 'the lease of worker ' || d.claimed_by || ' expired' end
                          end
  from decided d
 where t.id = d.id
   and t.lease_expires_at is not null  -- running, but no reason to walk through all that run
returning d.claim_outcome
