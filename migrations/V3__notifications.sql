-- Every hint goes out on one channel, `taskwire`, as a word and what it is about:
--
--   tasks <id> <id> …      these tasks can be claimed (at most 200 ids)
--   codebases <id> <id> …  many tasks of these codebases can be claimed (`*`: of any)
--   cancel <task id>       a running task is to be cancelled
--   worker <worker id>     this worker's routing changed, or a newer stream took over
--   canary <replica id> …  a replica proves that its notifications arrive
--
-- A hint carries no truth: receivers read the tables. It may be lost, repeated, late or forged,
-- and that changes latency, never correctness.

-- One statement, few notifications: Postgres holds a cluster-wide lock from the first NOTIFY of a
-- transaction to its commit, and refuses payloads of 8,000 bytes. 200 ids are 7,406 bytes.
create function tasks_notify_inserted() returns trigger language plpgsql as $$
declare
    ready_max constant integer := 2000;
    ready integer;
begin
    select count(*) into ready
      from (select 1 from inserted where status = 'pending' and due limit ready_max + 1) as capped;
    if ready = 0 then
        return null;
    elsif ready <= ready_max then
        perform pg_notify('taskwire', 'tasks ' || string_agg(id::text, ' '))
           from (select id, (row_number() over () - 1) / 200 as chunk
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

create trigger tasks_notify_inserted
    after insert on tasks
    referencing new table as inserted
    for each statement execute function tasks_notify_inserted();

-- A row that is not due yet says so. `when` spares every other insert even the call.
create function tasks_schedule() returns trigger language plpgsql as $$
begin
    new.due := new.run_at <= clock_timestamp();
    return new;
end
$$;

create trigger tasks_schedule_inserted
    before insert on tasks
    for each row when (new.status = 'pending' and new.due and new.run_at > now())
    execute function tasks_schedule();

create trigger tasks_schedule_updated
    before update on tasks
    for each row when (new.status = 'pending' and new.run_at is distinct from old.run_at)
    execute function tasks_schedule();

-- A task that can be claimed from now on: released, retried, lapsed, promoted, requeued by hand, or
-- changed in what routes it. Claims, heartbeats and completions never get here. (Triggers of one
-- kind run in the order of their names: this one after the schedule above.)
create function tasks_turn_ready() returns trigger language plpgsql as $$
begin
    new.ready_xid := pg_current_xact_id()::text::bigint;
    perform pg_notify('taskwire', 'tasks ' || new.id);
    return new;
end
$$;

create trigger tasks_turn_ready
    before update on tasks
    for each row
    when (new.status = 'pending' and new.due
          and (old.status, old.due, old.codebase_id, old.priority, old.required_capabilities,
               old.target_worker_id, old.target_agent_name, old.expires_at)
              is distinct from
              (new.status, new.due, new.codebase_id, new.priority, new.required_capabilities,
               new.target_worker_id, new.target_agent_name, new.expires_at))
    execute function tasks_turn_ready();

create function tasks_notify_cancel() returns trigger language plpgsql as $$
begin
    perform pg_notify('taskwire', 'cancel ' || new.id);
    return null;
end
$$;

create trigger tasks_notify_cancel
    after update on tasks
    for each row
    when (new.claimed_by is not null and old.status = 'running'
          and ((new.cancel_requested_at is not null and old.cancel_requested_at is null
                and new.status = 'running')
               or (new.status = 'cancelled' and new.cancel_requested_at is null)))
    execute function tasks_notify_cancel();

create function workers_notify_changed() returns trigger language plpgsql as $$
begin
    perform pg_notify('taskwire', 'worker ' || new.id);
    return null;
end
$$;

create trigger workers_notify_changed
    after update on workers
    for each row
    when ((old.name, old.codebases, old.capabilities)
          is distinct from (new.name, new.codebases, new.capabilities))
    execute function workers_notify_changed();

create function streams_notify_changed() returns trigger language plpgsql as $$
begin
    perform pg_notify('taskwire', 'worker ' || old.worker_id);
    return null;
end
$$;

create function workers_notify_gone() returns trigger language plpgsql as $$
begin
    perform pg_notify('taskwire', 'worker ' || old.id);
    return null;
end
$$;

create trigger workers_notify_gone
    after delete on workers
    for each row execute function workers_notify_gone();

-- A newer stream of the same worker, on whatever replica, took the row over.
create trigger streams_notify_taken_over
    after update on streams
    for each row when (old.connection_id <> new.connection_id)
    execute function streams_notify_changed();

comment on function tasks_notify_inserted() is 'Tells every replica, at commit, which new tasks can be claimed.';
comment on function tasks_schedule() is 'Keeps tasks.due true to tasks.run_at.';
comment on function tasks_turn_ready() is 'Marks a task as claimable from this transaction on, and tells every replica.';
comment on function tasks_notify_cancel() is 'Tells the replica of the owner that a running task is to be cancelled.';
comment on function workers_notify_changed() is 'Tells every replica that a worker''s routing changed.';
comment on function workers_notify_gone() is 'Tells every replica that a worker is no longer registered.';
comment on function streams_notify_changed() is 'Tells every replica that a worker''s stream was taken over by a newer one.';
