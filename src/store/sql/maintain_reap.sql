-- maintain_reap
-- Looks at claims whose lease has lapsed. An owner with a stream on a live replica, or that called
-- within the lease, keeps its claim: the lease moves on. Otherwise the task is pending again, or
-- failed when its attempts are used up, or cancelled when that was asked for. Safe on every replica
-- at once: rows that another replica is reaping are skipped.
--
-- After an outage, a pause or a step of the clock every sign of life looks old. So a replica only
-- judges while its own has been steady for $5 s: by then the others and the workers have shown theirs.
-- $1 rows, $2 lease, $3 silence of a replica, $4 this replica.
with lapsed as materialized (
    select t.id, t.attempt, t.max_attempts, t.cancel_requested_at,
           case when exists (select 1
                               from streams s
                               join replicas r on r.id = s.replica_id
                              where s.worker_id = t.claimed_by
                                and r.last_seen_at > now() - make_interval(secs => $3)) then now()
                else (select greatest(w.last_seen_at, w.stream_ended_at) from workers w where w.id = t.claimed_by)
           end + make_interval(secs => $2) as alive_until
      from tasks t
     where t.status = 'running'
       and t.lease_expires_at <= now()
       and exists (select 1
                     from replicas me
                    where me.id = $4
                      and me.last_seen_at > now() - make_interval(secs => $3)
                      and me.steady_since < now() - make_interval(secs => $5))
     order by t.lease_expires_at
     limit $1
       for no key update of t skip locked
), judged as (
    select l.id, l.alive_until,
           case when l.alive_until > now() then 'running'
                when l.cancel_requested_at is not null then 'cancelled'
                when l.attempt < l.max_attempts then 'pending'
                else 'failed'
           end as status
      from lapsed l
)
update tasks t
   set status           = judged.status,
       lease_expires_at = case when judged.status = 'running' then judged.alive_until end,
       claimed_by       = case when judged.status = 'pending' then null else t.claimed_by end,
       claimed_at       = case when judged.status = 'pending' then null else t.claimed_at end,
       claim_id         = case when judged.status = 'pending' then null else t.claim_id end,
       finished_at      = case when judged.status in ('failed', 'cancelled') then now() end,
       error            = case when judged.status = 'running' then t.error
                               when judged.status = 'failed' then format('gave up after %s attempts: the lease of worker %s expired', t.attempt, t.claimed_by)
                               else format('attempt %s: the lease of worker %s expired', t.attempt, t.claimed_by) end
  from judged
 where t.id = judged.id
   and t.status = 'running'
returning t.status as "status: Status"
