-- What a year leaves behind: 1,000,000 finished tasks, and a busy day on top of them. Task n has the id
-- 00000000-0000-7000-8000-<n in 12 hex digits>, so that ids grow with time as those of the API do. The same in
-- every run.
set synchronous_commit = off;
set session_replication_role = replica;  -- no triggers: rows are written as they are in the end

-- Checks cost as much as all the rest of an insert. They come back without a look at what is there.
create temp table put_off as
select format('alter table %s drop constraint %I', conrelid::regclass, conname) as off,
       format('alter table %s add constraint %I %s not valid', conrelid::regclass, conname,
              replace(pg_get_constraintdef(oid), ' NOT VALID', '')) as back
  from pg_constraint
 where contype = 'c' and conrelid in ('tasks'::regclass, 'attempts'::regclass, 'heartbeats'::regclass);
do $$ declare sql text; begin
    for sql in select off from put_off loop execute sql; end loop;
end $$;

-- What the tests call: ids of tasks n, workers of tasks n, and where the last sweep was.
create schema plans;
create function plans.id(n bigint) returns uuid language sql immutable
    return ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid;
create function plans.ids(first bigint, count bigint) returns uuid[] language sql immutable
    return (select array_agg(plans.id(n)) from generate_series(first, first + count - 1) as n);
create function plans.keys(first bigint, count bigint) returns text[] language sql immutable
    return (select array_agg('key-' || n * 10) from generate_series(first / 10, first / 10 + count - 1) as n);
create function plans.owners(first bigint, count bigint) returns text[] language sql immutable
    return (select array_agg('worker-' || 1000 + n * 7 % 1000) from generate_series(first, first + count - 1) as n);
create function plans.codebases(first bigint, count bigint) returns text[] language sql immutable
    return (select array_agg('codebase-' || n % 50 || ',codebase-' || (n + 7) % 50) from generate_series(first, first + count - 1) as n);
create function plans.all_codebases() returns text[] language sql immutable
    return (select array[string_agg('codebase-' || c, ',')] from generate_series(0, 49) as c);
create function plans.workers(first bigint, count bigint, modulus bigint) returns text[] language sql immutable
    return (select array_agg('worker-' || n % modulus) from generate_series(first, first + count - 1) as n);

-- Statistics are made once, at the end, and nothing is swept away between two measurements.
alter table tasks set (autovacuum_enabled = off);
alter table attempts set (autovacuum_enabled = off);
alter table heartbeats set (autovacuum_enabled = off);

-- Alive for the next hour.
insert into replicas (id, address, version, started_at, steady_since, last_seen_at)
select plans.id(n), '127.0.0.1:' || 8000 + n, '0.1.0', now() - interval '1 day', now() - interval '1 day',
       now() + interval '1 hour'
  from generate_series(1, 3) as n;

-- Two codebases each; worker-0 has all fifty.
insert into workers (id, name, codebases, capabilities)
select 'worker-' || n, 'worker-' || n,
       case n when 0 then (select array_agg('codebase-' || c) from generate_series(0, 49) as c)
              else array['codebase-' || n % 50, 'codebase-' || (n + 7) % 50] end,
       case n % 3 when 0 then '{gpu,linux}'::text[] else '{linux}' end
  from generate_series(0, 1999) as n;

insert into streams (worker_id, connection_id, replica_id)
select 'worker-' || n, plans.id(n), plans.id(1 + n % 3) from generate_series(0, 1499) as n;

-- Finished within 31 days, of which retention keeps 30.
insert into tasks (id, title, status, codebase_id, priority, claimed_by, attempt, claim_epoch, created_at, run_at,
                   claimed_at, finished_at, prompt, metadata, result, error, claim_outcome, idempotency_key,
                   idempotency_hash)
select plans.id(n), 'task ' || n, status, 'codebase-' || n % 50, n % 7919 % 10, 'worker-' || n % 2000, 1, 1,
       ended - interval '2 minutes', ended - interval '2 minutes', ended - interval '1 minute', ended,
       'do what has to be done', '{"team": "a"}', case status when 'completed' then '{"ok": true}'::jsonb end,
       case status when 'failed' then 'exit code 1' end, status,
       case when n % 10 = 0 then 'key-' || n end, case when n % 10 = 0 then '\x00'::bytea end
  from (select n, now() - interval '31 days' * ((1000001 - n) / 1000000.0) as ended,
               case when n % 100 = 50 then 'failed' when n % 100 = 51 then 'cancelled' else 'completed' end as status
          from generate_series(1, 1000000) as n) as finished;

insert into attempts (task_id, claim_epoch, attempt, worker_id, started_at, ended_at, outcome, error)
select id, 1, 1, claimed_by, claimed_at, finished_at, claim_outcome, error from tasks;

insert into heartbeats (task_id, claim_epoch, heartbeat_at, lease_expires_at, progress, message)
select plans.id(n), 1, now() - interval '1 hour', now() - interval '1 hour', 1, 'done'
  from generate_series(1, 1000000, 10) as n;

-- 100,000 wait: a tenth for everyone, a twentieth for later, a twentieth until they expire, and of both
-- 1,000 whose time has come. A fifth needs a capability that a third of the workers has.
insert into tasks (id, title, codebase_id, priority, created_at, run_at, expires_at, prompt, required_capabilities,
                   due, ready_xid)
select plans.id(n), 'task ' || n, case when n % 10 = 0 then 'global' else 'codebase-' || n % 50 end, n % 7919 % 10,
       now() - interval '1 hour' * ((1100001 - n) / 100000.0),
       case when n % 100 = 21 then now() - interval '1 second'
            when n % 100 between 22 and 25 then now() + interval '1 second' * (n % 86400 + 600)
            else now() - interval '2 hours' end,
       case when n % 100 = 31 then now() - interval '1 second'
            when n % 100 between 32 and 35 then now() + interval '1 second' * (n % 86400 + 600) end,
       'do what has to be done',
       case when n % 7907 % 5 = 0 then '{gpu}'::text[] else '{}' end, n % 100 not between 21 and 25,
       -- Announced long ago, by one transaction after the other.
       pg_current_xact_id()::text::bigint - (1100001 - n) / 1000
  from generate_series(1000001, 1100000) as n;

create table plans.last_ready as select pg_current_xact_id()::text::bigint as xid;

-- 2,000 run, two for each of 1,000 workers of which the half has a stream. The lease of the last 200 is over; half
-- of these have heartbeats that say otherwise.
insert into tasks (id, title, status, codebase_id, priority, claimed_by, claim_id, attempt, claim_epoch, created_at,
                   run_at, claimed_at, lease_expires_at, prompt, timeout_seconds, cancel_requested_at)
select plans.id(n), 'task ' || n, 'running', 'codebase-' || n % 50, n % 7919 % 10, 'worker-' || 1000 + n * 7 % 1000, plans.id(n / 2),
       1, 1, now() - interval '2 hours', now() - interval '2 hours', now() - interval '10 minutes',
       now() + interval '1 second' * (case when n > 1101800 then -1 else 3600 end), 'do what has to be done', 7200,
       case when n % 50 = 0 then now() - interval '1 second' end
  from generate_series(1100001, 1102000) as n;

insert into heartbeats (task_id, claim_epoch, heartbeat_at, lease_expires_at, progress, message)
select plans.id(n), 1, now() - interval '5 seconds', now() + interval '1 hour', 0.5, 'half way'
  from generate_series(1100001, 1101900) as n;

do $$ declare sql text; begin
    for sql in select back from put_off loop execute sql; end loop;
end $$;
create function plans.snapshot(back bigint) returns text language sql immutable
    return (select format('%1$s:%1$s:', xid - back) from plans.last_ready);
reset session_replication_role;
