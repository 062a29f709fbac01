-- Two corrections of V8. An operator who ends a task by hand, with all the columns that belong to its end, gets its
-- attempt noted and its worker told like anybody. And a task whose claim ended and that is due in the same moment
-- was due by one look at the clock and not by the other: nobody was told. Now one look decides.

create or replace function tasks_change_state() returns trigger language plpgsql as $$
declare
    history_max constant integer := 1000;
    by_server boolean;
    is_revoked boolean;
begin
    -- The fence holds only if each claim raises the epoch, and nothing else changes it.
    if new.claim_epoch - old.claim_epoch <> (old.status <> 'running' and new.status = 'running')::integer then
        raise exception 'task %: claim_epoch grows by one with each claim and never changes otherwise', old.id
            using errcode = 'check_violation', table = 'tasks', constraint = 'tasks_claim_raises_epoch',
                  hint = 'Leave claim_epoch alone; requeue_task(id) takes a task from its worker.';
    end if;

    if old.status = 'running' then
        if new.status = 'running' and new.claimed_by is not distinct from old.claimed_by then
            return new;
        end if;
        -- The server's own statements say all of this, and note the attempt, too, many at a time.
        if new.finished_at is not null and new.lease_expires_at is null
                and new.claim_outcome is distinct from old.claim_outcome
                and new.status in ('completed', 'failed', 'cancelled')
                and current_setting('application_name') = 'taskwire' then
            return new;
        end if;
    elsif new.status = 'running' then
        -- The release before does not clear what the last claim left.
        if new.claim_outcome is not null then
            new.claim_outcome := null;
        end if;
        return new;
    elsif new.status = old.status then
        return new;
    end if;

    by_server := current_setting('application_name') = 'taskwire';
    is_revoked := new.claim_outcome = 'timed_out';
    if new.status = 'running' then
        -- Only claimed_by was changed.
        if new.claimed_by is not null then
            raise exception 'task % is claimed by %: a claim cannot be handed over', new.id, old.claimed_by
                using errcode = 'check_violation', table = 'tasks', constraint = 'tasks_claim_is_not_handed_over',
                      hint = 'Give it back with requeue_task(id), and set target_worker_id to say who is to have it.';
        end if;
        new.status := 'pending';
    end if;

    if new.status = 'pending' then
        new.claimed_by       := null;
        new.claimed_at       := null;
        new.claim_id         := null;
        new.lease_expires_at := null;
        new.finished_at      := null;
        new.result           := null;
        new.due              := new.run_at <= clock_timestamp();
        if new.cancel_requested_at is not distinct from old.cancel_requested_at then
            new.cancel_requested_at := null;
            new.cancel_reason       := null;
        end if;
        if new.due then
            new.ready_xid := pg_current_xact_id()::text::bigint;
            perform pg_notify('taskwire', 'tasks ' || new.id);
        end if;
    else
        new.lease_expires_at := null;
        new.finished_at      := coalesce(new.finished_at, now());
        if new.status = 'cancelled' then
            new.cancel_requested_at := coalesce(new.cancel_requested_at, now());
        end if;
    end if;

    if old.status = 'running' then
        -- Who does not say how the claim ended is an operator, or a server of an older release.
        if new.claim_outcome is null or new.claim_outcome is not distinct from old.claim_outcome then
            is_revoked := not by_server;
            new.claim_outcome := case when new.status <> 'pending' then new.status
                                      when not by_server then 'requeued'
                                      when new.attempt < old.attempt then 'released'
                                      when new.error like 'attempt % expired' then 'lapsed'
                                      else 'failed' end;
        end if;
        insert into attempts (task_id, claim_epoch, attempt, worker_id, started_at, claim_id, revoked, outcome, error)
        values (old.id, old.claim_epoch, old.attempt, old.claimed_by, old.claimed_at, old.claim_id,
                coalesce(is_revoked, false), new.claim_outcome,
                case when new.claim_outcome in ('failed', 'lapsed', 'timed_out')
                       or new.claim_outcome = 'cancelled' and new.error is distinct from old.error
                     then new.error end)
            on conflict do nothing;
        if old.claim_epoch > history_max then
            delete from attempts a where a.task_id = old.id and a.claim_epoch <= old.claim_epoch - history_max;
        end if;
        -- Its worker does not know.
        if is_revoked then
            perform pg_notify('taskwire', 'cancel ' || old.id);
        end if;
    end if;
    return new;
end
$$;

drop trigger tasks_schedule_updated on tasks;
create trigger tasks_schedule_updated
    before update of run_at on tasks
    for each row
    when (old.status = 'pending' and new.status = 'pending' and new.run_at is distinct from old.run_at)
    execute function tasks_schedule();

comment on column tasks.claim_outcome is 'How the last claim ended, see attempts.outcome; null before the first one and while running. The server''s own.';
