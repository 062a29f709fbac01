-- task_heartbeat
-- Signs of life of some claims, many in one statement. The row of the task is locked, not changed: so
-- the reaper, which locks it too before it judges, either comes first and the fence matches nothing, or
-- comes later and sees this heartbeat. A row that somebody has locked costs its heartbeat another try,
-- and nobody else anything. What a heartbeat leaves out stays as this claim said it before;
-- a checkpoint outlives its claim. $7 is the lease.
with asked as (
    select * from unnest($1::uuid[], $2::text[], $3::bigint[], $4::double precision[], $5::text[], $6::jsonb[])
        with ordinality as a (task_id, worker_id, claim_epoch, progress, message, checkpoint, n)
), held as materialized (
    select t.id, t.claim_epoch, a.n, a.progress, a.message, a.checkpoint,
           t.cancel_requested_at is not null as cancel_requested,
           least(now() + make_interval(secs => $7), t.claimed_at + make_interval(secs => t.timeout_seconds)) as lease_expires_at
      from asked a
      join tasks t on t.id = a.task_id
     where t.lease_expires_at is not null  -- running; see task_finish
       and t.claimed_by = a.worker_id
       and (a.claim_epoch is null or t.claim_epoch = a.claim_epoch)
     order by t.id, a.n
       for share of t skip locked
), merged as (  -- several of one task in one batch: of each field the last that was given
    select id, claim_epoch, lease_expires_at,
           (array_agg(progress   order by n desc) filter (where progress   is not null))[1] as progress,
           (array_agg(message    order by n desc) filter (where message    is not null))[1] as message,
           (array_agg(checkpoint order by n desc) filter (where checkpoint is not null))[1] as checkpoint
      from held
     group by id, claim_epoch, lease_expires_at
), beaten as (
    insert into heartbeats as h (task_id, claim_epoch, lease_expires_at, progress, message, checkpoint)
    select id, claim_epoch, lease_expires_at, progress, message, checkpoint
      from merged
     order by id
        on conflict (task_id) do update
       set heartbeat_at     = now(),
           claim_epoch      = excluded.claim_epoch,
           lease_expires_at = excluded.lease_expires_at,
           progress         = case when h.claim_epoch = excluded.claim_epoch then coalesce(excluded.progress, h.progress)
                                   else excluded.progress end,
           message          = case when h.claim_epoch = excluded.claim_epoch then coalesce(excluded.message, h.message)
                                   else excluded.message end,
           checkpoint       = coalesce(excluded.checkpoint, h.checkpoint)
)
select held.n as "n!", held.claim_epoch, held.cancel_requested as "cancel_requested!",
       extract(epoch from held.lease_expires_at - now())::double precision as "lease_expires_in!"
  from held
