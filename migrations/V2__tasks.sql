-- The tasks, and the one predicate that says whose they are.

create table tasks (
    id                    uuid        not null default gen_random_uuid(),
    title                 text        not null,
    status                text        not null default 'pending',
    codebase_id           text        not null default 'global',
    priority              integer     not null default 0,
    claimed_by            text,
    attempt               integer     not null default 0,
    max_attempts          integer     not null default 3,
    claim_epoch           bigint      not null default 0,
    created_at            timestamptz not null default now(),
    run_at                timestamptz not null default now(),
    expires_at            timestamptz,
    claimed_at            timestamptz,
    lease_expires_at      timestamptz,
    finished_at           timestamptz,
    timeout_seconds       integer,
    required_capabilities text[]      not null default '{}',
    target_worker_id      text,
    target_agent_name     text,
    agent_type            text,
    prompt                text,
    metadata              jsonb       not null default '{}',
    result                jsonb,
    error                 text,
    cancel_requested_at   timestamptz,
    cancel_reason         text,
    claim_id              uuid,
    idempotency_key       text,
    idempotency_hash      bytea,
    due                   boolean     not null default true,
    ready_xid             bigint      not null default (pg_current_xact_id()::text::bigint),

    constraint tasks_pkey primary key (id),

    -- What a value may be.
    constraint tasks_title_length check (char_length(title) between 1 and 500),
    constraint tasks_status_is_known check (status in ('pending', 'running', 'completed', 'failed', 'cancelled')),
    constraint tasks_codebase_is_valid check (taskwire_is_id(codebase_id)),
    constraint tasks_capabilities_are_valid check (taskwire_are_ids(required_capabilities) and cardinality(required_capabilities) <= 100),
    constraint tasks_target_worker_is_valid check (taskwire_is_id(target_worker_id)),
    constraint tasks_target_agent_is_valid check (char_length(target_agent_name) between 1 and 128),
    constraint tasks_agent_type_is_valid check (taskwire_is_id(agent_type)),
    constraint tasks_prompt_is_small check (octet_length(prompt) <= 1048576),
    constraint tasks_metadata_is_object check (jsonb_typeof(metadata) = 'object'),
    constraint tasks_max_attempts_range check (max_attempts between 1 and 1000),
    constraint tasks_timeout_range check (timeout_seconds between 1 and 31536000),
    -- Postgres knows `infinity` and years up to 294276, of which neither JSON nor most languages have an
    -- idea: one such row, written by hand, would break whoever reads it.
    constraint tasks_times_are_in_range check (
            created_at          between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
        and run_at              between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
        and expires_at          between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
        and claimed_at          between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
        and lease_expires_at    between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
        and finished_at         between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
        and cancel_requested_at between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'),

    -- What a state is. Nobody, the server included, can write a row that is none of these.
    constraint tasks_pending_is_unclaimed check (
        status <> 'pending' or (claimed_by is null and claimed_at is null and claim_id is null)),
    constraint tasks_running_is_claimed check (
        status <> 'running' or (claimed_by is not null and claimed_at is not null and claim_epoch > 0)),
    constraint tasks_running_has_lease check ((status = 'running') = (lease_expires_at is not null)),
    constraint tasks_finished_has_time check (
        (status in ('completed', 'failed', 'cancelled')) = (finished_at is not null)),
    constraint tasks_idempotency_is_whole check ((idempotency_key is null) = (idempotency_hash is null))
) with (fillfactor = 80,
        autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05,
        autovacuum_vacuum_insert_scale_factor = 0.1);

-- Best first within a codebase: the order of every backlog.
create index tasks_pending_best on tasks (codebase_id, priority desc, created_at, id)
    where status = 'pending' and due;
-- What became claimable since a replica last looked (the sweep).
-- `ready_xid > 0` is always true; it keeps the planner from taking this index for a backlog.
create index tasks_pending_ready on tasks (ready_xid, id)
    where status = 'pending' and due and ready_xid > 0;
-- What will expire unclaimed.
create index tasks_pending_expiry on tasks (expires_at) where status = 'pending' and expires_at is not null;
-- What will become due (the promotion).
create index tasks_scheduled on tasks (run_at) where status = 'pending' and not due;
-- Whose lease lapses next (the reaper), and what a worker holds.
create index tasks_running_lease on tasks (lease_expires_at) where status = 'running';
create index tasks_running_worker on tasks (claimed_by) where status = 'running';
-- Listings and retention.
create index tasks_by_creation on tasks (created_at, id);
create index tasks_by_finish on tasks (finished_at) where finished_at is not null;
create unique index tasks_idempotency_key on tasks (idempotency_key) where idempotency_key is not null;

comment on table  tasks is 'Units of work. `insert into tasks (title) values (''…'')` is all it takes: connected workers hear of it at commit.';
comment on column tasks.id is 'The task. Time-ordered (UUID v7) when made by the API.';
comment on column tasks.title is 'What to do, in a line; 1 to 500 characters.';
comment on column tasks.status is 'pending -> running -> completed | failed | cancelled; back to pending on release, retry or lapsed lease.';
comment on column tasks.codebase_id is 'Routes the task: to workers with this codebase, to all of them (''global''), or to whoever claims it (''__pending__'').';
comment on column tasks.priority is 'Higher first; 0 is usual.';
comment on column tasks.claimed_by is 'The worker that owns the task, or that finished it. Null while pending: the claim is `where claimed_by is null`.';
comment on column tasks.attempt is 'How many claims counted against max_attempts; a release is not counted.';
comment on column tasks.max_attempts is 'After this many attempts a failure is final.';
comment on column tasks.claim_epoch is 'The fencing token: grows with each claim, never reset. Writes of an earlier claim match no row.';
comment on column tasks.created_at is 'When the task was inserted; among equals of priority the older comes first.';
comment on column tasks.run_at is 'Not claimable before this moment.';
comment on column tasks.expires_at is 'Not claimable after this moment; null: never expires.';
comment on column tasks.claimed_at is 'When the current or last owner claimed the task.';
comment on column tasks.lease_expires_at is 'Until when the claim lives without a sign of life of its owner; set exactly while running.';
comment on column tasks.finished_at is 'When the task was completed, failed for good or cancelled.';
comment on column tasks.timeout_seconds is 'How long one attempt may take; null: no limit.';
comment on column tasks.required_capabilities is 'Only workers that have all of these are told of the task and may claim it.';
comment on column tasks.target_worker_id is 'When set, only this worker.';
comment on column tasks.target_agent_name is 'When set, only workers of this name.';
comment on column tasks.agent_type is 'The kind of agent wanted; carried for the workers, not interpreted.';
comment on column tasks.prompt is 'The work itself; up to 1 MiB of text.';
comment on column tasks.metadata is 'Whatever the producer adds; an object.';
comment on column tasks.result is 'What the worker returned with its completion.';
comment on column tasks.error is 'Why the last attempt failed.';
comment on column tasks.cancel_requested_at is 'When the cancellation of a running task was asked for.';
comment on column tasks.cancel_reason is 'Why it was cancelled.';
comment on column tasks.claim_id is 'The client-made id of the current claim: a claim repeated with it gets the same answer.';
comment on column tasks.idempotency_key is 'The creator''s Idempotency-Key: the same key makes no second task.';
comment on column tasks.idempotency_hash is 'SHA-256 of the body that came with the key; another body under the same key is refused.';
comment on column tasks.due is 'False while run_at lies in the future; kept by a trigger and by the promotion.';
comment on column tasks.ready_xid is 'The transaction that last made the task claimable; the sweep finds by it what was not announced.';

-- THE routing predicate (protocol R1 to R3). Who hears of a task, and who may claim it, is decided
-- here and nowhere else in SQL; src/domain/routing.rs says the same in Rust, and a test holds the
-- two together. A single expression, so that the planner inlines it.
create function task_is_for(
    codebase_id text, required_capabilities text[], target_worker_id text, target_agent_name text,
    worker_id text, worker_name text, worker_codebases text[], worker_capabilities text[]
) returns boolean
    language sql immutable parallel safe
    return (codebase_id in ('global', '__pending__') or codebase_id = any (worker_codebases))
       and required_capabilities <@ worker_capabilities
       and (target_worker_id is null or target_worker_id = worker_id)
       and (target_agent_name is null or target_agent_name = worker_name);

comment on function task_is_for(text, text[], text, text, text, text, text[], text[]) is
    'Whether a task (first four) is for a worker (last four): decides both who hears of it and who may claim it.';
