-- task_finish
-- Completes, fails and releases claims, many in one statement. The fence stands in the `where`: only the
-- task's present owner, at the epoch that it names, changes anything. Of several calls for one claim the
-- first one counts: they are joined in their order, for which the clauses that join are such that Postgres can
-- neither hash nor merge by them.
--
-- A failed attempt is retried after a pause while attempts are left. A task whose cancellation was
-- asked for ends cancelled instead.
--
-- A task that ends here brings along all that belongs to its end, its attempt too, which the trigger
-- tasks_change_state would do one by one: it costs a third of that. What becomes pending again is left to it.
--
-- `lease_expires_at is not null` is `status = 'running'` (tasks_running_has_lease) in words that fit no
-- partial index: with old statistics the planner would rather walk through all that run.
with asked as materialized (
    select *
      from unnest($1::uuid[], $2::text[], $3::bigint[], $4::text[], $5::jsonb[], $6::text[], $7::boolean[], $8::double precision[])
           with ordinality as a (task_id, worker_id, claim_epoch, verb, result, error, retry, retry_after, n)
     order by task_id, n  -- every batch of every replica locks in the order of ids: no deadlock
), done as (
    update tasks t
       set (status, claim_outcome, lease_expires_at, finished_at, cancel_requested_at, run_at) = (
               select s.status,
                      case when s.status in ('completed', 'cancelled') then s.status
                           when a.verb = 'release' then 'released'
                           else 'failed' end,
                      case when s.status = 'pending' then t.lease_expires_at end,
                      case when s.status <> 'pending' then now() end,
                      case when s.status = 'cancelled' then coalesce(t.cancel_requested_at, now()) else t.cancel_requested_at end,
                      case when s.status = 'pending' and a.verb = 'fail'
                           then now() + coalesce(make_interval(secs => a.retry_after), retry_wait(t.attempt))
                           else t.run_at end
                 from (select case when a.verb = 'complete' then 'completed'
                                   when a.verb = 'cancel' or t.cancel_requested_at is not null then 'cancelled'
                                   when a.verb = 'release' then 'pending'
                                   when a.retry and t.attempt < t.max_attempts then 'pending'
                                   else 'failed' end as status) as s),
           attempt = case when a.verb = 'release' then greatest(t.attempt - 1, 0) else t.attempt end,
           result  = case when a.verb in ('complete', 'cancel') then a.result else t.result end,
           error   = case a.verb when 'complete' then null
                                 when 'fail' then a.error
                                 else coalesce(a.error, t.error) end
      from asked a
     where t.id = any (array[a.task_id])
       and t.lease_expires_at is not null
       and t.claimed_by is not distinct from a.worker_id
       and (a.claim_epoch is null or t.claim_epoch = a.claim_epoch)
    returning a.n, a.error as said, t.id, t.status, t.attempt, t.max_attempts, t.claim_epoch, t.claimed_by,
              t.claimed_at, t.claim_id, t.claim_outcome, t.run_at
), noted as (
    insert into attempts (task_id, claim_epoch, attempt, worker_id, started_at, claim_id, outcome, error)
    select id, claim_epoch, attempt, claimed_by, claimed_at, claim_id, claim_outcome,
           case when claim_outcome in ('failed', 'cancelled') then said end
      from done
     where status <> 'pending'
        on conflict do nothing
)
select n as "n!", status as "status!: Status", attempt as "attempt!", max_attempts as "max_attempts!",
       claim_epoch as "claim_epoch!",
       greatest(extract(epoch from run_at - now()), 0)::double precision as "run_in_seconds!"
  from done
