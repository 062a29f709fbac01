-- Streams with slots (protocol S11): the server claims for their workers. Another replica that ends a
-- claim of such a worker has to know whom to tell.

alter table streams add column slots integer;
alter table streams add constraint streams_slots_range check (slots between 1 and 1000) not valid;
-- Where nobody has slots, to ask for them costs nothing.
create index streams_with_slots on streams (worker_id) where slots is not null;

comment on column streams.slots is 'How many tasks at a time the server may claim for the worker and push to it; null: the worker claims by itself.';

create or replace view worker_states as
    select w.id as worker_id, w.name, w.codebases, w.capabilities, w.hostname,
           s.connected_at, r.address as replica,
           date_trunc('second', now() - greatest(w.last_seen_at, w.stream_ended_at, s.connected_at, r.last_seen_at)) as silent_for,
           (select count(*) from tasks t where t.claimed_by = w.id and t.status = 'running') as running,
           s.slots
      from workers w
      left join (streams s join replicas r on r.id = s.replica_id) on s.worker_id = w.id
     order by w.id;

comment on column worker_states.slots is 'How many tasks at a time its stream is given; null: it claims by itself, or has no stream.';
