//! What Postgres does by itself, in a database that no replica listens to. A floor is measured in the same
//! round as what is compared with it.

use std::fs::{File, remove_file};
use std::io::Write;
use std::time::{Duration, Instant};

use sqlx::postgres::PgListener;
use sqlx::{ConnectOptions, Connection};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Failure;
use super::figures::Latencies;
use super::ground::{Database, Ground};
use super::pgbench::{Length, Pace};
use super::schedule::Schedule;

/// Tables like `tasks`: its columns, constraints and indexes, without and with the trigger that notifies;
/// and one that has next to nothing.
const TABLES: &str = "
create table floor_tasks (like tasks including all) with (fillfactor = 80);
create table floor_notifying (like tasks including all) with (fillfactor = 80);
create trigger floor_notifying_inserted after insert on floor_notifying
    referencing new table as inserted for each statement execute function tasks_notify_inserted();
create table floor_bare (id uuid primary key, title text, status text, codebase_id text, priority integer,
                         created_at timestamptz, claimed_by text);
create function floor_notify() returns trigger language plpgsql as $$
begin
    perform pg_notify('floor', new.title);
    return null;
end
$$;
create table floor_hint (id uuid primary key, title text);
create trigger floor_hint_inserted after insert on floor_hint
    for each row execute function floor_notify();
";
/// How long a notification may take.
const NOTIFY_DEADLINE: Duration = Duration::from_secs(10);
/// Writes that are flushed one after the other.
const FLUSHES: usize = 200;
/// What a flush writes: a page of Postgres' log.
const FLUSHED_BYTES: usize = 8 * 1024;
/// Rows of an insert of many.
pub(super) const ROWS_OF_A_BATCH: u32 = 100;

/// A table that floors insert into.
#[derive(Clone, Copy, Debug)]
pub(super) enum Table {
    LikeTasks,
    Notifying,
    Bare,
}

impl Table {
    fn insert(self) -> &'static str {
        match self {
            Self::LikeTasks => {
                "insert into floor_tasks (title, codebase_id) values ('bench', 'bench')"
            }
            Self::Notifying => {
                "insert into floor_notifying (title, codebase_id) values ('bench', 'bench')"
            }
            Self::Bare => {
                "insert into floor_bare (id, title, status, codebase_id, priority, created_at) \
                 values (gen_random_uuid(), 'bench', 'pending', 'bench', 0, now())"
            }
        }
    }

    fn insert_many(self) -> String {
        let table = if matches!(self, Self::Notifying) { "floor_notifying" } else { "floor_tasks" };
        format!(
            "insert into {table} (title, codebase_id) \
             select 'bench', 'bench' from generate_series(1, {ROWS_OF_A_BATCH})"
        )
    }

    fn fill(self, rows: u64) -> String {
        let key = "lpad(k::text, 32, '0')::uuid";
        match self {
            Self::Bare => format!(
                "truncate floor_bare; insert into floor_bare (id, title, status, codebase_id, priority, created_at) \
                 select {key}, 'bench', 'pending', 'bench', 0, now() from generate_series(1, {rows}) as k; \
                 analyze floor_bare"
            ),
            _ => format!(
                "truncate floor_tasks; insert into floor_tasks (id, title, codebase_id) \
                 select {key}, 'bench', 'bench' from generate_series(1, {rows}) as k; \
                 analyze floor_tasks"
            ),
        }
    }

    /// Claims row `k`.
    fn claim(self) -> &'static str {
        match self {
            Self::Bare => {
                "update floor_bare set claimed_by = 'bench', status = 'running' \
                 where id = lpad(:k::text, 32, '0')::uuid and claimed_by is null returning id, title"
            }
            _ => {
                "update floor_tasks set claimed_by = 'bench', status = 'running', claimed_at = now(), \
                 claim_epoch = claim_epoch + 1, attempt = attempt + 1, lease_expires_at = now() + interval '60 s' \
                 where id = lpad(:k::text, 32, '0')::uuid and claimed_by is null and status = 'pending' \
                 returning id, title, claim_epoch"
            }
        }
    }
}

/// Floors, and the database they are measured in.
#[derive(Debug)]
pub(super) struct Floors<'a> {
    ground: &'a Ground,
    database: Database,
}

impl<'a> Floors<'a> {
    pub(super) async fn prepare(ground: &'a Ground) -> Result<Self, Failure> {
        let database = ground.database_with_schema().await?;
        database.execute(TABLES).await?;
        Ok(Self { ground, database })
    }

    /// Single-row inserts, each committed.
    pub(super) async fn inserts(
        &self,
        table: Table,
        clients: u32,
        seconds: f64,
    ) -> Result<Pace, Failure> {
        self.pace(table.insert(), clients, seconds).await
    }

    /// Inserts of [`ROWS_OF_A_BATCH`] rows; the pace is that of rows.
    pub(super) async fn batches(
        &self,
        table: Table,
        clients: u32,
        seconds: f64,
    ) -> Result<Pace, Failure> {
        let pace = self.pace(&table.insert_many(), clients, seconds).await?;
        Ok(Pace { per_second: pace.per_second * f64::from(ROWS_OF_A_BATCH), ..pace })
    }

    async fn pace(&self, sql: &str, clients: u32, seconds: f64) -> Result<Pace, Failure> {
        match &self.ground.pgbench {
            Some(pgbench) => {
                let length = Length::Seconds(seconds);
                pgbench.run(self.ground, &self.database, sql, clients, length).await
            }
            None => by_connections(&self.database, sql, clients, Limit::Seconds(seconds)).await,
        }
    }

    /// Single-row claims of distinct rows, `each` of them by each client.
    pub(super) async fn claims(
        &self,
        table: Table,
        clients: u32,
        each: u64,
    ) -> Result<Pace, Failure> {
        self.database.execute(&table.fill(u64::from(clients) * each)).await?;
        let sql = table.claim();
        match &self.ground.pgbench {
            Some(pgbench) => {
                let script = format!("\\set n :n + 1\n\\set k :client_id * {each} + :n\n{sql};\n");
                let length = Length::Transactions(each);
                pgbench.run(self.ground, &self.database, &script, clients, length).await
            }
            None => by_connections(&self.database, sql, clients, Limit::Rows(each)).await,
        }
    }

    /// From an INSERT sent to its notification read by a connection that listens, idle.
    pub(super) async fn notify(&self, schedule: &mut Schedule) -> Result<Latencies, Failure> {
        let mut listener = PgListener::connect(&self.database.url()).await?;
        listener.listen("floor").await?;
        let mut connection = self.database.connect().await?;
        let mut latencies = Vec::new();
        while schedule.next().await.is_some() {
            let title = latencies.len().to_string();
            let sent = Instant::now();
            let insert = sqlx::query("insert into floor_hint values (gen_random_uuid(), $1)")
                .bind(&title)
                .execute(&mut connection);
            let heard = timeout(NOTIFY_DEADLINE, async {
                while listener.recv().await?.payload() != title {}
                Ok::<_, sqlx::Error>(sent.elapsed())
            });
            let (inserted, heard) = tokio::join!(insert, heard);
            inserted?;
            latencies.push(heard.map_err(|_| "a notification did not come")??);
        }
        connection.close().await?;
        Ok(Latencies::new(latencies))
    }

    /// fdatasync of a page at a time, beside the data folder.
    pub(super) fn flushes(&self) -> Result<Latencies, Failure> {
        let path = self.ground.folder().join("flush");
        let mut file = File::create(&path)?;
        let page = [1; FLUSHED_BYTES];
        let mut latencies = Vec::with_capacity(FLUSHES);
        for _ in 0..FLUSHES {
            let begun = Instant::now();
            file.write_all(&page)?;
            file.sync_data()?;
            latencies.push(begun.elapsed());
        }
        remove_file(&path)?;
        Ok(Latencies::new(latencies))
    }
}

/// How long [`by_connections`] runs.
#[derive(Clone, Copy, Debug)]
enum Limit {
    Seconds(f64),
    Rows(u64),
}

/// Where there is no pgbench: the same by connections of our own.
async fn by_connections(
    database: &Database,
    sql: &str,
    clients: u32,
    limit: Limit,
) -> Result<Pace, Failure> {
    let mut running = JoinSet::new();
    let begun = Instant::now();
    for client in 0..u64::from(clients) {
        let (options, sql) = (database.options.clone(), sql.replace(":k::text", "$1"));
        running.spawn(async move {
            let mut connection = options.connect().await?;
            let mut count = 0;
            loop {
                match limit {
                    Limit::Seconds(seconds) if begun.elapsed().as_secs_f64() >= seconds => break,
                    Limit::Rows(each) if count >= each => break,
                    _ => count += 1,
                }
                let query = sqlx::query(sqlx::AssertSqlSafe(sql.clone()));
                match limit {
                    Limit::Seconds(_) => query.execute(&mut connection).await?,
                    Limit::Rows(each) => {
                        query
                            .bind((client * each + count).to_string())
                            .execute(&mut connection)
                            .await?
                    }
                };
            }
            Ok::<_, sqlx::Error>(count)
        });
    }
    let mut count = 0;
    while let Some(ended) = running.join_next().await {
        count += ended??;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let per_second = count as f64 / seconds;
    Ok(Pace { per_second, latency_ms: f64::from(clients) / per_second * 1000.0 })
}
