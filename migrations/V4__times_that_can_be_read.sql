-- Times that no client can read are no times. Postgres knows `infinity` and years up to 294276, of
-- which neither JSON nor most languages have an idea: one such row, written by hand, would break
-- whoever reads it. (`not valid`, as migrations/README.md asks of a new CHECK.)

alter table tasks add constraint tasks_times_are_in_range check (
        created_at          between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
    and run_at              between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
    and expires_at          between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
    and claimed_at          between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
    and lease_expires_at    between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
    and finished_at         between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
    and cancel_requested_at between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
) not valid;

alter table workers add constraint workers_times_are_in_range check (
        registered_at   between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
    and last_seen_at    between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
    and stream_ended_at between '1970-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
) not valid;
