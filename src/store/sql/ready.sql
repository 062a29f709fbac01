-- ready
-- What /readyz asks of Postgres: a primary, with the schema of this release.
select pg_is_in_recovery() as "is_standby!",
       (select coalesce(max(version), 0) from refinery_schema_history) as "schema_version!"
