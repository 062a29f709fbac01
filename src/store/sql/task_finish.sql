-- task_finish
-- Completes, fails and releases claims, many in one statement. The fence stands in both `where`s:
-- only the task's present owner, at the epoch that it names, changes anything. (What else belongs to
-- the end of a claim is done by the trigger tasks_leave_state.)
--
-- A failed attempt is retried after a pause while attempts are left. A task whose cancellation was
-- asked for ends cancelled instead.
--
-- `lease_expires_at is not null` is `status = 'running'` (tasks_running_has_lease) in words that fit no
-- partial index: with old statistics the planner would rather walk through all that run.
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
     where t.lease_expires_at is not null
       and t.claimed_by = a.worker_id
       and (a.claim_epoch is null or t.claim_epoch = a.claim_epoch)
     order by t.id, a.n
       for no key update of t
), first as (
    select distinct on (id) * from held order by id, n
)
update tasks t
   set status        = first.status,
       claim_outcome = case when first.status in ('completed', 'cancelled') then first.status
                            when first.verb = 'release' then 'released'
                            else 'failed' end,
       attempt       = case when first.verb = 'release' then greatest(t.attempt - 1, 0) else t.attempt end,
       run_at        = case when first.status = 'pending' and first.verb = 'fail'
                            then now() + coalesce(make_interval(secs => first.retry_after), retry_wait(t.attempt))
                            else t.run_at end,
       result        = case when first.verb in ('complete', 'cancel') then first.result else t.result end,
       error         = case first.verb when 'complete' then null
                                       when 'fail' then first.error
                                       else coalesce(first.error, t.error) end
  from first
 where t.id = first.id
   and t.lease_expires_at is not null
   and t.claimed_by = first.worker_id
   and t.claim_epoch = first.claim_epoch
returning first.n as "n!", t.status as "status: Status", t.attempt, t.max_attempts, t.claim_epoch,
          greatest(extract(epoch from t.run_at - now()), 0)::double precision as "run_in_seconds!"
