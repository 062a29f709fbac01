-- What operators may rely on. Tables change with the code; a view here only gains columns, and
-- tests/it/operators.rs runs every one.

alter table tasks validate constraint tasks_claim_outcome_is_known;
alter table tasks validate constraint tasks_attempt_range;

comment on column tasks.claim_epoch is 'The fencing token: grows with each claim, never reset. Writes of an earlier claim match no row. A deleted id is not to be inserted again: its epochs would begin anew.';

-- A worker whose presence somebody deleted by hand is still connected: its replica puts the row back.
create trigger streams_notify_deleted
    after delete on streams
    for each row when (current_setting('application_name') <> 'taskwire')
    execute function streams_notify_changed();

-- The same rule as before, without the count in braces, over which a regular expression takes thirty
-- times as long; it is asked at every insert and update.
create or replace function taskwire_is_id(id text) returns boolean
    language sql immutable parallel safe
    return octet_length(id) between 1 and 128 and id !~ '[^A-Za-z0-9._:/@-]';

-- The dead letters, newest first.
create index tasks_failed on tasks (finished_at) where status = 'failed';

create view queue_depth as
    select codebase_id,
           count(*) filter (where due) as waiting,
           count(*) filter (where not due) as scheduled,
           max(priority) filter (where due) as highest_priority,
           date_trunc('second', now() - min(greatest(created_at, run_at)) filter (where due)) as oldest_waits
      from tasks
     where status = 'pending'
     group by codebase_id
     order by waiting desc, codebase_id;

comment on view   queue_depth is 'How much waits in each codebase, and for how long.';
comment on column queue_depth.codebase_id is 'The codebase.';
comment on column queue_depth.waiting is 'Tasks that could be claimed now.';
comment on column queue_depth.scheduled is 'Tasks whose run_at has not come.';
comment on column queue_depth.highest_priority is 'The highest priority among those that wait.';
comment on column queue_depth.oldest_waits is 'How long the oldest of them has been claimable.';

create view running_tasks as
    select t.id, t.title, t.codebase_id, t.priority, t.claimed_by as worker_id, t.attempt, t.claim_epoch,
           date_trunc('second', now() - t.claimed_at) as running_for,
           round(extract(epoch from greatest(t.lease_expires_at, h.lease_expires_at) - now()), 1) as lease_left_s,
           round(extract(epoch from t.claimed_at + make_interval(secs => t.timeout_seconds) - now()), 1) as timeout_left_s,
           s.worker_id is not null as has_stream,
           h.heartbeat_at, h.progress, h.message,
           t.cancel_requested_at
      from tasks t
      left join heartbeats h on h.task_id = t.id and h.claim_epoch = t.claim_epoch
      left join streams s on s.worker_id = t.claimed_by
     where t.status = 'running'
     order by t.claimed_at, t.id;

comment on view   running_tasks is 'Who works on what, for how long, and how long the claim lives.';
comment on column running_tasks.id is 'The task.';
comment on column running_tasks.title is 'What it is about.';
comment on column running_tasks.codebase_id is 'Its codebase.';
comment on column running_tasks.priority is 'Its priority.';
comment on column running_tasks.worker_id is 'Who has claimed it.';
comment on column running_tasks.attempt is 'Which attempt it is.';
comment on column running_tasks.claim_epoch is 'Which claim it is.';
comment on column running_tasks.running_for is 'Since when.';
comment on column running_tasks.lease_left_s is 'Seconds until the lease runs out. Then a replica looks: a worker with a stream keeps the claim for another lease.';
comment on column running_tasks.timeout_left_s is 'Seconds until timeout_seconds end the attempt; null: no timeout.';
comment on column running_tasks.has_stream is 'Whether the worker has an open stream, which keeps the claim alive.';
comment on column running_tasks.heartbeat_at is 'The last heartbeat of this claim.';
comment on column running_tasks.progress is 'How far the worker says it is, 0 to 1.';
comment on column running_tasks.message is 'What the worker says of it.';
comment on column running_tasks.cancel_requested_at is 'When the worker was asked to stop.';

create view dead_letters as
    select id, title, codebase_id, attempt, max_attempts, claimed_by as worker_id, claim_outcome, error,
           finished_at, created_at
      from tasks
     where status = 'failed'
     order by finished_at desc;

comment on view   dead_letters is 'Tasks that have failed for good, newest first. requeue_task(id) gives one another chance.';
comment on column dead_letters.id is 'The task.';
comment on column dead_letters.title is 'What it is about.';
comment on column dead_letters.codebase_id is 'Its codebase.';
comment on column dead_letters.attempt is 'How many attempts it had.';
comment on column dead_letters.max_attempts is 'How many it might have had.';
comment on column dead_letters.worker_id is 'Whose attempt was the last one; null: it expired unclaimed.';
comment on column dead_letters.claim_outcome is 'How the last attempt ended.';
comment on column dead_letters.error is 'Why.';
comment on column dead_letters.finished_at is 'When it was given up.';
comment on column dead_letters.created_at is 'When it was created.';

create view attempt_history as
    select task_id, claim_epoch, attempt, worker_id, started_at, ended_at, outcome, error, late_calls
      from attempts
     union all
    select id, claim_epoch, attempt, claimed_by, claimed_at, null, null, null, 0
      from tasks
     where status = 'running';

comment on view   attempt_history is 'Every claim of every task, ended or running.';
comment on column attempt_history.task_id is 'The task.';
comment on column attempt_history.claim_epoch is 'Which claim of the task.';
comment on column attempt_history.attempt is 'Which attempt, of those that count.';
comment on column attempt_history.worker_id is 'Who has or had the claim.';
comment on column attempt_history.started_at is 'When it was claimed.';
comment on column attempt_history.ended_at is 'When the claim ended; null: it runs.';
comment on column attempt_history.outcome is 'How it ended, see attempts.outcome; null: it runs.';
comment on column attempt_history.error is 'Why it failed, lapsed or timed out.';
comment on column attempt_history.late_calls is 'Calls of this claim that came after its end and were refused.';

create view worker_states as
    select w.id as worker_id, w.name, w.codebases, w.capabilities, w.hostname,
           s.connected_at, r.address as replica,
           date_trunc('second', now() - greatest(w.last_seen_at, w.stream_ended_at, s.connected_at, r.last_seen_at)) as silent_for,
           (select count(*) from tasks t where t.claimed_by = w.id and t.status = 'running') as running
      from workers w
      left join (streams s join replicas r on r.id = s.replica_id) on s.worker_id = w.id
     order by w.id;

comment on view   worker_states is 'Workers, their streams and what they hold.';
comment on column worker_states.worker_id is 'The worker.';
comment on column worker_states.name is 'Its name.';
comment on column worker_states.codebases is 'Whose tasks it takes.';
comment on column worker_states.capabilities is 'What it can do.';
comment on column worker_states.hostname is 'Its machine, as it told.';
comment on column worker_states.connected_at is 'When its stream was opened; null: it has none.';
comment on column worker_states.replica is 'The replica that has its stream.';
comment on column worker_states.silent_for is 'Since its last sign of life, by stream or call.';
comment on column worker_states.running is 'How many tasks it holds.';

create view replica_states as
    select r.id as replica_id, r.address, r.version, r.started_at,
           date_trunc('milliseconds', now() - r.last_seen_at) as silent_for,
           (select count(*) from streams s where s.replica_id = r.id) as streams
      from replicas r
     order by r.started_at;

comment on view   replica_states is 'Running servers and how many streams each has.';
comment on column replica_states.replica_id is 'The replica.';
comment on column replica_states.address is 'Where it listens.';
comment on column replica_states.version is 'Its release.';
comment on column replica_states.started_at is 'When it began to serve.';
comment on column replica_states.silent_for is 'Since its last sign of life; 15 s and more: the others give it up.';
comment on column replica_states.streams is 'Streams that it has open.';

create view stuck_tasks as
    select t.id, t.title, t.codebase_id, t.status, t.claimed_by as worker_id,
           'nobody who is connected has its codebase, its capabilities and its target' as why,
           t.created_at
      from tasks t
     where t.status = 'pending' and t.due
       and not exists (select 1
                         from streams s
                         join workers w on w.id = s.worker_id
                        where task_is_for(t.codebase_id, t.required_capabilities, t.target_worker_id, t.target_agent_name,
                                          w.id, w.name, w.codebases, w.capabilities))
     union all
    select t.id, t.title, t.codebase_id, t.status, t.claimed_by,
           'its worker was asked to cancel it more than a minute ago and goes on', t.created_at
      from tasks t
     where t.status = 'running' and t.cancel_requested_at < now() - interval '1 minute'
     union all
    select t.id, t.title, t.codebase_id, t.status, t.claimed_by,
           'its lease ran out more than 10 s ago and no replica has looked: is one running?', t.created_at
      from tasks t
     where t.status = 'running' and t.lease_expires_at < now() - interval '10 seconds'
       and not exists (select 1 from heartbeats h
                        where h.task_id = t.id and h.claim_epoch = t.claim_epoch and h.lease_expires_at > now());

comment on view   stuck_tasks is 'Tasks that will not move on by themselves, and why. Looks at every waiting task.';
comment on column stuck_tasks.id is 'The task.';
comment on column stuck_tasks.title is 'What it is about.';
comment on column stuck_tasks.codebase_id is 'Its codebase.';
comment on column stuck_tasks.status is 'pending or running.';
comment on column stuck_tasks.worker_id is 'Who has claimed it.';
comment on column stuck_tasks.why is 'What is in the way.';
comment on column stuck_tasks.created_at is 'When it was created.';

-- Again from the beginning, whatever state it is in: with all its attempts, at once, uncancelled. Taken from
-- a worker, that worker is told, and its calls are refused from then on.
create function requeue_task(id uuid) returns text language sql volatile as $$
    update tasks t
       set status = 'pending', attempt = 0, run_at = now(), error = null, claim_outcome = null,
           cancel_requested_at = null, cancel_reason = null,
           expires_at = case when t.expires_at > now() then t.expires_at end
     where t.id = requeue_task.id
    returning t.status
$$;

comment on function requeue_task(uuid) is
    'Has a task done again, whatever state it is in: all attempts anew, claimable at once. Gives its status; null: there is no such task.';

-- A pending task ends at once. A running one is marked, and its worker is told; it ends when the worker obeys,
-- or with its lease or timeout. What has ended stays as it is.
create function cancel_task(id uuid, reason text default null) returns text language sql volatile as $$
    with target as materialized (
        select t.id, t.status from tasks t where t.id = cancel_task.id for no key update
    ), changed as (
        update tasks t
           set status              = case when target.status = 'pending' then 'cancelled' else t.status end,
               cancel_requested_at = coalesce(t.cancel_requested_at, now()),
               cancel_reason       = coalesce(t.cancel_reason, reason)
          from target
         where t.id = target.id
           and target.status in ('pending', 'running')
        returning t.status
    )
    select coalesce(changed.status, target.status) from target left join changed on true
$$;

comment on function cancel_task(uuid, text) is
    'Calls a task off: pending ends at once, of a running one its worker is told. Gives its status after that; null: there is no such task.';
