-- How far a worker has read its stream. A stream is told no more than fits into a socket until its worker is
-- proven to have read it (protocol S8), and a claim that was lost on another replica leaves no other trace.
alter table workers
    add column asked_task_id uuid,
    add column asked_at      timestamptz;

comment on column workers.asked_task_id is 'The task that the worker asked for last, in vain, on a replica where it had no stream: so far it has read its stream. Null: it asked for whatever was best.';
comment on column workers.asked_at is 'When it asked so. Null: never.';
