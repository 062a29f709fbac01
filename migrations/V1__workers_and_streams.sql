-- Who serves, who works, and who hears: replicas, workers and the streams between them.
--
-- A worker's liveness is three separate facts in three places: its open stream (streams), its last
-- call (workers.last_seen_at) and the lease on each task it holds (tasks.lease_expires_at).

-- The one rule for ids that people choose: worker ids, codebases, capabilities.
-- The list variant exists because a CHECK cannot contain a subquery.
create function taskwire_is_id(id text) returns boolean
    language sql immutable parallel safe
    return id ~ '^[A-Za-z0-9._:/@-]{1,128}$';

create function taskwire_are_ids(ids text[]) returns boolean
    language sql immutable parallel safe
    return cardinality(ids) = 0
        or (array_position(ids, null) is null
            and cardinality(string_to_array(array_to_string(ids, ' '), ' ')) = cardinality(ids)
            and array_to_string(ids, ' ') ~ '^[A-Za-z0-9._:/@-]{1,128}( [A-Za-z0-9._:/@-]{1,128})*$');

comment on function taskwire_is_id(text) is
    'True for 1 to 128 characters of A-Z a-z 0-9 . _ : / @ -, the alphabet of every id that people choose.';
comment on function taskwire_are_ids(text[]) is
    'taskwire_is_id for every element of a list; true for the empty list.';

create table replicas (
    id           uuid        not null,
    address      text        not null,
    version      text        not null,
    started_at   timestamptz not null default now(),
    last_seen_at timestamptz not null default now(),
    steady_since timestamptz not null default now(),
    constraint replicas_pkey primary key (id)
) with (fillfactor = 50);

comment on table  replicas is 'Running server processes. None is special; a row is gone when its replica left or was silent for 15 s.';
comment on column replicas.id is 'New with every start of a replica, never reused.';
comment on column replicas.address is 'The address the replica listens on.';
comment on column replicas.version is 'The release of Taskwire that the replica runs.';
comment on column replicas.started_at is 'When the replica began to serve.';
comment on column replicas.last_seen_at is 'The replica''s last sign of life; it vouches for all its streams.';
comment on column replicas.steady_since is 'Since when its signs of life have come without a longer gap; a replica ends claims only when it is steady.';

create table workers (
    id              text        not null,
    name            text        not null,
    codebases       text[]      not null default '{}',
    capabilities    text[]      not null default '{}',
    hostname        text,
    metadata        jsonb       not null default '{}',
    registered_at   timestamptz not null default now(),
    last_seen_at    timestamptz not null default now(),
    stream_ended_at timestamptz,
    constraint workers_pkey primary key (id),
    constraint workers_id_is_valid check (taskwire_is_id(id)),
    constraint workers_name_length check (char_length(name) between 1 and 128),
    constraint workers_codebases_are_valid check (taskwire_are_ids(codebases) and cardinality(codebases) <= 500),
    constraint workers_capabilities_are_valid check (taskwire_are_ids(capabilities) and cardinality(capabilities) <= 100),
    constraint workers_hostname_is_short check (char_length(hostname) <= 255),
    constraint workers_metadata_is_object check (jsonb_typeof(metadata) = 'object'),
    constraint workers_metadata_is_small check (octet_length(metadata::text) <= 524288),
    constraint workers_times_are_in_range check (
            registered_at   between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
        and last_seen_at    between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
        and stream_ended_at between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00')
) with (fillfactor = 70);

comment on table  workers is 'Processes that execute tasks. A worker is registered by a call or by connecting.';
comment on column workers.id is 'The worker_id that the worker chose or was given; stable across its reconnects.';
comment on column workers.name is 'The worker''s agent name; tasks.target_agent_name refers to it.';
comment on column workers.codebases is 'Tasks of these codebases are for this worker, besides those of ''global'' and ''__pending__''.';
comment on column workers.capabilities is 'What this worker can do; a task''s required_capabilities must all be among them.';
comment on column workers.hostname is 'The machine, as the worker told it.';
comment on column workers.metadata is 'Whatever else the worker told at its registration.';
comment on column workers.registered_at is 'When the worker was first seen.';
comment on column workers.last_seen_at is 'The worker''s last call, to within a few seconds. An open stream does not change it: see streams.';
comment on column workers.stream_ended_at is 'When the worker''s last stream ended; null if none has.';

create table streams (
    worker_id     text        not null,
    connection_id uuid        not null,
    replica_id    uuid        not null,
    connected_at  timestamptz not null default now(),
    constraint streams_pkey primary key (worker_id),
    constraint streams_worker_exists foreign key (worker_id) references workers (id) on delete cascade,
    constraint streams_replica_exists foreign key (replica_id) references replicas (id) on delete cascade
) with (fillfactor = 70);

create index streams_by_replica on streams (replica_id);

comment on table  streams is 'Presence: the one open stream of each connected worker. A newer stream takes the row over, which ends the older one.';
comment on column streams.worker_id is 'Whose stream it is.';
comment on column streams.connection_id is 'Names this one connection: clean-up after an older connection never matches a newer one''s row.';
comment on column streams.replica_id is 'The replica that the worker is connected to.';
comment on column streams.connected_at is 'When this connection was made.';
