-- How claims go on and how they end: heartbeats, attempts, and what a change of a task's state means,
-- whoever makes it.

alter table tasks add column claim_outcome text;
-- Validated by V5: to look at every row would hold the strong lock for too long.
alter table tasks add constraint tasks_claim_outcome_is_known
    check (claim_outcome in ('completed', 'failed', 'released', 'cancelled', 'lapsed', 'timed_out', 'requeued'))
    not valid;
alter table tasks add constraint tasks_attempt_range check (attempt between 0 and 1000000) not valid;
comment on column tasks.claim_outcome is 'How the last claim ended, see attempts.outcome; null before the first one and while running.';

-- What heartbeats change stands here and not in tasks: nothing of it is indexed, the rows are small,
-- and a heartbeat rewrites no prompt.
create table heartbeats (
    task_id          uuid             not null,
    claim_epoch      bigint           not null,
    heartbeat_at     timestamptz      not null default now(),
    lease_expires_at timestamptz      not null,
    progress         double precision,
    message          text,
    checkpoint       jsonb,
    constraint heartbeats_pkey primary key (task_id),
    constraint heartbeats_progress_range check (progress between 0 and 1),
    constraint heartbeats_message_is_small check (octet_length(message) <= 4096),
    constraint heartbeats_checkpoint_is_small check (pg_column_size(checkpoint) <= 524288),
    constraint heartbeats_times_are_in_range check (
            heartbeat_at     between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
        and lease_expires_at between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00')
) with (fillfactor = 50,
        autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05);

comment on table  heartbeats is 'The last heartbeat of each task that had one. Goes with its task.';
comment on column heartbeats.task_id is 'The task.';
comment on column heartbeats.claim_epoch is 'The claim that the heartbeat was for; what an earlier claim said counts no more, but for its checkpoint.';
comment on column heartbeats.heartbeat_at is 'When it came.';
comment on column heartbeats.lease_expires_at is 'Until when it keeps the claim alive; the later of this and tasks.lease_expires_at counts.';
comment on column heartbeats.progress is 'How far the work is, 0 to 1, as the worker said.';
comment on column heartbeats.message is 'What the worker said of it, for people.';
comment on column heartbeats.checkpoint is 'Where the next attempt can go on, in the worker''s own terms; handed to whoever claims the task next.';

create table attempts (
    task_id     uuid        not null,
    claim_epoch bigint      not null,
    attempt     integer     not null,
    worker_id   text        not null,
    started_at  timestamptz not null,
    ended_at    timestamptz not null default now(),
    outcome     text        not null,
    error       text,
    claim_id    uuid,
    revoked     boolean     not null default false,
    late_calls  integer     not null default 0,
    constraint attempts_pkey primary key (task_id, claim_epoch),
    constraint attempts_outcome_is_known check (
        outcome in ('completed', 'failed', 'released', 'cancelled', 'lapsed', 'timed_out', 'requeued'))
) with (fillfactor = 90,
        autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05,
        autovacuum_vacuum_insert_scale_factor = 0.1);

comment on table  attempts is 'One row for each claim that has ended, the last 1,000 of each task; attempt_history has the running ones too. Goes with its task.';
comment on column attempts.task_id is 'The task.';
comment on column attempts.claim_epoch is 'Which claim of the task.';
comment on column attempts.attempt is 'Which attempt it was of those that count; a released one is counted again.';
comment on column attempts.worker_id is 'Who had the claim.';
comment on column attempts.started_at is 'When it was claimed.';
comment on column attempts.ended_at is 'When the claim ended.';
comment on column attempts.outcome is 'completed, failed, released or cancelled by its worker; lapsed: its worker fell silent; timed_out: it took longer than timeout_seconds; requeued: taken back by hand.';
comment on column attempts.error is 'Why it failed, lapsed or timed out.';
comment on column attempts.claim_id is 'The client-made id of the claim: a call with it that was long on its way claims nothing again.';
comment on column attempts.revoked is 'Whether it was ended against its worker, by hand or by its timeout: the worker is told.';
comment on column attempts.late_calls is 'Calls of this claim that came after its end and were refused.';

-- A call to claim the next tasks that was long on its way.
create index attempts_by_claim on attempts (claim_id) where claim_id is not null;

-- The pause before the next attempt (protocol C5): 1 s · 2^attempt, at most 10 min, each ± 25 %.
create function retry_wait(attempt integer) returns interval
    language sql volatile
    return make_interval(secs => least(600, 2.0 ^ least(attempt, 10)) * (0.75 + random() / 2));

comment on function retry_wait(integer) is 'The pause after a failed attempt: 2, 4, 8, … seconds up to 10 minutes, give or take a quarter.';

-- Until when a claim lives, by all signs of life: the owner's stream, for which its replica vouches; the
-- end of that stream; the task's heartbeats. Volatile on purpose: each query in it then sees what was
-- committed up to now, and whoever has locked the task's row before can rely on it.
create function claim_alive_until(task_id uuid, claim_epoch bigint, worker_id text, lease interval)
    returns timestamptz language sql volatile as $$
    select greatest(
        (select h.lease_expires_at from heartbeats h
          where h.task_id = claim_alive_until.task_id and h.claim_epoch = claim_alive_until.claim_epoch),
        -- 5 s: a replica shows a sign of life every second, however short the lease is.
        (select coalesce(r.last_seen_at + greatest(lease, interval '5 seconds'), w.stream_ended_at + lease)
           from workers w
           left join (streams s join replicas r on r.id = s.replica_id) on s.worker_id = w.id
          where w.id = claim_alive_until.worker_id))
$$;

comment on function claim_alive_until(uuid, bigint, text, interval) is
    'Until when a claim lives: a lease after the last sign of life of its owner''s stream, or as long as a heartbeat gave it.';

-- Whether a call to claim the next tasks is the first one of its claim_id. Calls with one claim_id go one
-- after the other, and a repetition sees what the first one got.
create function claim_is_first(worker_id text, claim_id uuid) returns boolean
    language plpgsql volatile as $$
begin
    if claim_id is null then
        return true;
    end if;
    perform pg_advisory_xact_lock(hashtextextended(worker_id || ' ' || claim_id, 0));
    return not exists (select 1 from tasks t
                        where t.claimed_by = claim_is_first.worker_id
                          and t.status = 'running'
                          and t.claim_id = claim_is_first.claim_id)
       and not exists (select 1 from attempts a
                        where a.worker_id = claim_is_first.worker_id
                          and a.claim_id = claim_is_first.claim_id);
end
$$;

comment on function claim_is_first(text, uuid) is
    'Whether nothing was claimed with this claim_id yet; holds up other calls with it until commit.';

-- A task leaves its state, for whatever reason and by whomever. What belongs together changes together,
-- so the server's statements and an operator's `update tasks set status = …` are the same thing.
create function tasks_leave_state() returns trigger language plpgsql as $$
declare
    history_max constant integer := 1000;
    by_server constant boolean := current_setting('application_name') = 'taskwire';
    is_revoked boolean := new.claim_outcome = 'timed_out';
begin
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
    else
        new.lease_expires_at := null;
        new.finished_at      := coalesce(new.finished_at, now());
        if new.status = 'cancelled' then
            new.cancel_requested_at := coalesce(new.cancel_requested_at, now());
        end if;
    end if;

    if old.status = 'running' then
        -- Who does not say how the claim ended is an operator, or a server of the release before.
        if new.claim_outcome is not distinct from old.claim_outcome then
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
            delete from attempts a where a.task_id = old.id and a.claim_epoch = old.claim_epoch - history_max;
        end if;
        -- Its worker does not know.
        if is_revoked then
            perform pg_notify('taskwire', 'cancel ' || old.id);
        end if;
    end if;
    return new;
end
$$;

-- (Triggers of one kind run in the order of their names: this one before tasks_schedule_updated and
-- tasks_turn_ready, which announce what it makes pending.)
create trigger tasks_leave_state
    before update on tasks
    for each row
    when ((new.status <> old.status and new.status <> 'running')
          or (old.status = 'running' and new.claimed_by is distinct from old.claimed_by))
    execute function tasks_leave_state();

comment on function tasks_leave_state() is 'Keeps what belongs to a status together, notes the end of a claim in attempts, and tells a worker whose claim was ended for it.';

-- The release before does not clear what the last claim left.
create function tasks_enter_running() returns trigger language plpgsql as $$
begin
    new.claim_outcome := null;
    return new;
end
$$;

create trigger tasks_enter_running
    before update on tasks
    for each row
    when (old.status <> 'running' and new.status = 'running' and new.claim_outcome is not null)
    execute function tasks_enter_running();

comment on function tasks_enter_running() is 'Clears how the claim before ended.';

-- The fence holds only if each claim raises the epoch, and nothing else changes it; and attempts and
-- heartbeats are found by the id.
create function tasks_refuse() returns trigger language plpgsql as $$
begin
    raise exception 'task %: %', old.id, tg_argv[1]
        using errcode = 'check_violation', table = 'tasks', constraint = tg_argv[0], hint = tg_argv[2];
end
$$;

create trigger tasks_guard_epoch
    before update on tasks
    for each row
    when (new.claim_epoch - old.claim_epoch
          <> case when old.status <> 'running' and new.status = 'running' then 1 else 0 end)
    execute function tasks_refuse('tasks_claim_raises_epoch',
                                  'claim_epoch grows by one with each claim and never changes otherwise',
                                  'Leave claim_epoch alone; requeue_task(id) takes a task from its worker.');

create trigger tasks_guard_id
    before update on tasks
    for each row
    when (new.id <> old.id)
    execute function tasks_refuse('tasks_id_never_changes', 'an id never changes', 'Insert another task.');

comment on function tasks_refuse() is 'Refuses a change by a named rule: its arguments are name, message and hint.';

-- A changed timeout_seconds holds for the attempt that runs, too.
create function tasks_change_timeout() returns trigger language plpgsql as $$
begin
    new.lease_expires_at := least(new.lease_expires_at, new.claimed_at + make_interval(secs => new.timeout_seconds));
    return new;
end
$$;

create trigger tasks_change_timeout
    before update on tasks
    for each row
    when (old.status = 'running' and new.status = 'running'
          and new.timeout_seconds is distinct from old.timeout_seconds)
    execute function tasks_change_timeout();

comment on function tasks_change_timeout() is 'Has the reaper look at a running task when its new timeout is over.';

-- What a task leaves behind goes with it, however it is deleted.
create function tasks_forget() returns trigger language plpgsql as $$
begin
    delete from attempts   where task_id in (select id from removed);
    delete from heartbeats where task_id in (select id from removed);
    return null;
end
$$;

create trigger tasks_forget
    after delete on tasks
    referencing old table as removed
    for each statement execute function tasks_forget();

create function tasks_forget_all() returns trigger language plpgsql as $$
begin
    truncate attempts, heartbeats;
    return null;
end
$$;

create trigger tasks_forget_all
    after truncate on tasks
    for each statement execute function tasks_forget_all();

comment on function tasks_forget() is 'Deletes the attempts and heartbeats of deleted tasks.';
comment on function tasks_forget_all() is 'Empties attempts and heartbeats with tasks.';
