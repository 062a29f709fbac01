-- The same rules, for less work per statement. Postgres reads the expressions of all CHECKs and of every
-- trigger's `when` anew for each statement that writes to the table, from their stored form. Of a claim of
-- one task that was half of all the work. So: fewer and shorter expressions, no SQL function in them
-- (Postgres tries to inline one each time), and triggers that name their columns, which costs nothing
-- where a statement changes none of these.

-- Not inlined any more, and called for lists that are not empty only.
create or replace function taskwire_are_ids(ids text[]) returns boolean
    language plpgsql immutable parallel safe as $$
begin
    return cardinality(ids) = 0
        or (array_position(ids, null) is null
            and cardinality(string_to_array(array_to_string(ids, ' '), ' ')) = cardinality(ids)
            and array_to_string(ids, ' ') ~ '^[A-Za-z0-9._:/@-]{1,128}( [A-Za-z0-9._:/@-]{1,128})*$');
end
$$;

-- Validated by V9: to look at every row would hold the strong lock for too long. (All rows satisfy them: the
-- rules are those of before.)
alter table tasks
    drop constraint tasks_codebase_is_valid,
    drop constraint tasks_target_worker_is_valid,
    drop constraint tasks_agent_type_is_valid,
    drop constraint tasks_capabilities_are_valid,
    drop constraint tasks_status_is_known,
    drop constraint tasks_claim_outcome_is_known,
    drop constraint tasks_finished_has_time,
    drop constraint tasks_times_are_in_range;
-- The rule of taskwire_is_id.
alter table tasks
    add constraint tasks_codebase_is_valid check (codebase_id ~ '^[A-Za-z0-9._:/@-]{1,128}$') not valid,
    add constraint tasks_target_worker_is_valid check (target_worker_id ~ '^[A-Za-z0-9._:/@-]{1,128}$') not valid,
    add constraint tasks_agent_type_is_valid check (agent_type ~ '^[A-Za-z0-9._:/@-]{1,128}$') not valid,
    add constraint tasks_capabilities_are_valid check (
        cardinality(required_capabilities) = 0
        or (cardinality(required_capabilities) <= 100 and taskwire_are_ids(required_capabilities))) not valid,
    add constraint tasks_status_is_known check (
        status = any ('{pending,running,completed,failed,cancelled}'::text[])) not valid,
    add constraint tasks_claim_outcome_is_known check (
        claim_outcome = any ('{completed,failed,released,cancelled,lapsed,timed_out,requeued}'::text[])) not valid,
    add constraint tasks_finished_has_time check (
        (status = any ('{completed,failed,cancelled}'::text[])) = (finished_at is not null)) not valid,
    -- `greatest` and `least` pass over what is null.
    add constraint tasks_times_are_in_range check (
            least(created_at, run_at, expires_at, claimed_at, lease_expires_at, finished_at, cancel_requested_at)
                >= '1970-01-01 00:00:00+00'
        and greatest(created_at, run_at, expires_at, claimed_at, lease_expires_at, finished_at, cancel_requested_at)
                <= '9999-12-31 23:59:59.999999+00') not valid;

-- One look at what was inserted, where it is little.
create or replace function tasks_notify_inserted() returns trigger language plpgsql as $$
declare
    chunk_max constant integer := 200;
    ready_max constant integer := 2000;
    ready integer;
    ids text;
begin
    select count(*), string_agg(id::text, ' ') into ready, ids
      from (select id from inserted where status = 'pending' and due limit chunk_max + 1) as first;
    if ready = 0 then
        return null;
    elsif ready <= chunk_max then
        perform pg_notify('taskwire', 'tasks ' || ids);
        return null;
    end if;
    select count(*) into ready
      from (select 1 from inserted where status = 'pending' and due limit ready_max + 1) as capped;
    if ready <= ready_max then
        perform pg_notify('taskwire', 'tasks ' || string_agg(id::text, ' '))
           from (select id, (row_number() over () - 1) / chunk_max as chunk
                   from inserted where status = 'pending' and due) as numbered
          group by chunk;
    else
        -- 50 codebases of 128 characters are 6,450 bytes; with more, every stream looks.
        perform pg_notify('taskwire', 'codebases ' ||
                          case when count(*) <= 50 then string_agg(codebase_id, ' ') else '*' end)
           from (select distinct codebase_id
                   from inserted where status = 'pending' and due) as touched;
    end if;
    return null;
end
$$;

-- A task changes its state, for whatever reason and by whomever: what was tasks_leave_state,
-- tasks_enter_running and tasks_guard_epoch, and what tasks_turn_ready did for it. What belongs together
-- changes together, so the server's statements and an operator's `update tasks set status = …` are the
-- same thing.
create function tasks_change_state() returns trigger language plpgsql as $$
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
        -- Who says all of this has noted the attempt, too: the server's own statements do, many at a time.
        if new.finished_at is not null and new.lease_expires_at is null and new.claim_outcome is not null then
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

comment on function tasks_change_state() is 'Keeps what belongs to a status together, refuses a change of claim_epoch that is no claim, notes the end of a claim in attempts, announces what can be claimed again, and tells a worker whose claim was ended for it.';

drop trigger tasks_leave_state on tasks;
drop trigger tasks_enter_running on tasks;
drop trigger tasks_guard_epoch on tasks;
drop trigger tasks_guard_id on tasks;
drop trigger tasks_change_timeout on tasks;
drop trigger tasks_schedule_updated on tasks;
drop trigger tasks_turn_ready on tasks;
drop trigger tasks_notify_cancel on tasks;
drop function tasks_leave_state();
drop function tasks_enter_running();

-- Triggers of one kind run in the order of their names.
create trigger tasks_change_state
    before update of status, claimed_by, claim_epoch on tasks
    for each row
    execute function tasks_change_state();

create trigger tasks_change_timeout
    before update of timeout_seconds on tasks
    for each row
    when (old.status = 'running' and new.status = 'running'
          and new.timeout_seconds is distinct from old.timeout_seconds)
    execute function tasks_change_timeout();

create trigger tasks_guard_id
    before update of id on tasks
    for each row
    when (new.id <> old.id)
    execute function tasks_refuse('tasks_id_never_changes', 'an id never changes', 'Insert another task.');

create trigger tasks_schedule_updated
    before update of run_at on tasks
    for each row when (new.status = 'pending' and new.run_at is distinct from old.run_at)
    execute function tasks_schedule();

-- A pending task that has become due, or was changed in what routes it.
create trigger tasks_turn_ready
    before update of due, run_at, codebase_id, priority, required_capabilities, target_worker_id,
                     target_agent_name, expires_at on tasks
    for each row
    when (new.status = 'pending' and new.due and old.status = 'pending'
          and (old.due, old.codebase_id, old.priority, old.required_capabilities,
               old.target_worker_id, old.target_agent_name, old.expires_at)
              is distinct from
              (new.due, new.codebase_id, new.priority, new.required_capabilities,
               new.target_worker_id, new.target_agent_name, new.expires_at))
    execute function tasks_turn_ready();

-- (A running task that is cancelled at once is told of by tasks_change_state.)
create trigger tasks_notify_cancel
    after update of cancel_requested_at on tasks
    for each row
    when (old.status = 'running' and new.status = 'running'
          and old.cancel_requested_at is null and new.cancel_requested_at is not null)
    execute function tasks_notify_cancel();

comment on column tasks.claim_outcome is 'How the last claim ended, see attempts.outcome; null before the first one and while running. The server''s own: who writes it together with finished_at notes the attempt, too.';
