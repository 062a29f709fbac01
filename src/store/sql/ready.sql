-- ready
-- What /readyz asks of Postgres: a primary, with the schema of this release, that keeps what it
-- acknowledges and announces what is inserted. The reset_val of a setting is what a session has that
-- sets nothing itself.
select pg_is_in_recovery() as "is_standby!",
       current_setting('transaction_read_only') = 'on' as "is_read_only!",
       (select coalesce(max(version), 0) from refinery_schema_history) as "schema_version!",
       (select reset_val from pg_settings where name = 'synchronous_commit') as "synchronous_commit!",
       current_setting('fsync') = 'on' as "fsync!",
       current_setting('full_page_writes') = 'on' as "full_page_writes!",
       exists (select 1 from pg_trigger
                where tgrelid = to_regclass('tasks') and tgname = 'tasks_notify_inserted'
                  and (tgenabled = 'A' or tgenabled = 'O' and current_setting('session_replication_role') <> 'replica'))
         as "trigger_is_on!",
       pg_notification_queue_usage() as "queue_usage!",
       -- What plans were made for.
       (select array_agg(coalesce(pg_relation_size(to_regclass(name)), 0) order by n)
          from unnest('{tasks,attempts,heartbeats,workers,streams}'::text[]) with ordinality as t (name, n))
         as "table_bytes!"
