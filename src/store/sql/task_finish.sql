-- task_finish
-- Completes, fails and releases claims, many in one statement. The fence stands in both `where`s:
-- only the task's present owner, at the epoch that it names, changes anything.
--
-- A failed attempt is retried after 1 s · 2^attempt, at most 10 min, each ± 25 % (protocol C5),
-- while attempts are left. A task whose cancellation was asked for ends cancelled instead.
with asked as (
    select * from unnest($1::uuid[], $2::text[], $3::bigint[], $4::text[], $5::jsonb[], $6::text[], $7::boolean[], $8::double precision[])
        with ordinality as a (task_id, worker_id, claim_epoch, verb, result, error, retry, retry_after, n)
), held as materialized (
    select t.id, a.n, a.worker_id, a.verb, a.result, a.error, a.retry_after,
           t.claim_epoch,
           case when a.verb = 'complete' then 'completed'
                when a.verb = 'cancel' or t.cancel_requested_at is not null then 'cancelled'
                when a.verb = 'release' then 'pending'
                when a.retry and t.attempt < t.max_attempts then 'pending'
                else 'failed'
           end as status
      from asked a
      join tasks t on t.id = a.task_id
     where t.status = 'running'
       and t.claimed_by = a.worker_id
       and (a.claim_epoch is null or t.claim_epoch = a.claim_epoch)
     order by t.id, a.n
       for no key update of t
), first as (
    select distinct on (id) * from held order by id, n
)
update tasks t
   set status           = first.status,
       claimed_by       = case when first.status = 'pending' then null else t.claimed_by end,
       claimed_at       = case when first.status = 'pending' then null else t.claimed_at end,
       claim_id         = case when first.status = 'pending' then null else t.claim_id end,
       lease_expires_at = null,
       attempt          = case when first.verb = 'release' then greatest(t.attempt - 1, 0) else t.attempt end,
       run_at           = case when first.status = 'pending' and first.verb = 'fail'
                               then now() + make_interval(secs => coalesce(first.retry_after,
                                        least(600, 2.0 ^ least(t.attempt, 10)) * (0.75 + random() / 2)))
                               else t.run_at end,
       finished_at      = case when first.status = 'pending' then null else now() end,
       result           = case when first.verb in ('complete', 'cancel') then first.result else t.result end,
       error            = case first.verb when 'complete' then null
                                          when 'release' then t.error
                                          else coalesce(first.error, t.error) end,
       cancel_requested_at = case when first.status = 'cancelled' then coalesce(t.cancel_requested_at, now())
                                  else t.cancel_requested_at end
  from first
 where t.id = first.id
   and t.status = 'running'
   and t.claimed_by = first.worker_id
   and t.claim_epoch = first.claim_epoch
returning first.n as "n!", t.status as "status: Status", t.attempt, t.max_attempts, t.claim_epoch,
          greatest(extract(epoch from t.run_at - now()), 0)::double precision as "run_in_seconds!"
