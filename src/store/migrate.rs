//! Migrations at start: refinery's runner over sqlx's connection.
//!
//! refinery brings a tokio-postgres client of its own. Its two traits over our connection spare a
//! second driver, a second parser of URLs and a second TLS set-up; and where refinery's own client
//! unwraps a history row that someone edited by hand, this one says what is wrong with it.

use std::fmt;
use std::time::Duration;

use refinery::Migration;
use refinery_core::traits::r#async::{AsyncQuery, AsyncTransaction};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::link::bare;

mod files {
    refinery::embed_migrations!("migrations");
}

/// Replicas that start together wait for each other here. Any number of ours will do: "taskwire".
const ADVISORY_LOCK: i64 = 0x7461_736b_7769_7265;
/// How long the whole may take: waiting for another replica's migration included.
const DEADLINE: Duration = Duration::from_mins(5);
/// How a migration's session begins. `lock_timeout`: how long a statement may wait for a table's lock
/// before the file is tried again. Not given at the connection's start: poolers refuse that.
/// And no other limit, whatever the role has: a file may take long.
const SESSION: &str = "set lock_timeout = '3s'; set statement_timeout = 0; \
    set idle_in_transaction_session_timeout = 0; set client_min_messages = warning";
/// How long a session may take to answer while another one is in a transaction.
const PROBE_WAIT: Duration = Duration::from_secs(2);
/// How often a file that met a locked table is tried.
const LOCK_TRIES_MAX: u32 = 20;

/// Why the schema is not what this release needs. Each is a sentence for the operator.
#[derive(Debug)]
pub enum MigrateError {
    /// Postgres could not be asked.
    Connection(sqlx::Error),
    /// It is a standby: read-only, and unable to LISTEN.
    Standby,
    /// It leads through a pooler that gives each transaction to another session.
    Pooler,
    /// Another migration held the lock for too long.
    TookTooLong,
    /// The schema is of a newer release.
    TooNew {
        /// What the database has.
        found: i32,
        /// What this release knows.
        known: i32,
    },
    /// refinery's verdict: a file that failed, or a history that does not fit.
    Migration(refinery::Error),
}

impl fmt::Display for MigrateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection(_) => f.write_str("cannot ask Postgres for its schema"),
            Self::Standby => f.write_str(
                "this Postgres is a standby, which is read-only and cannot LISTEN: \
                 point DATABASE_URL at the primary",
            ),
            Self::Pooler => f.write_str(
                "this connection leads through a pooler in transaction mode, such as PgBouncer, where \
                 neither LISTEN nor migrations work: set DATABASE_LISTEN_URL to the direct address of \
                 Postgres (DATABASE_URL may stay as it is), or use pool_mode = session",
            ),
            Self::TookTooLong => write!(
                f,
                "the migrations did not end within {} s; is another replica stuck in them?",
                DEADLINE.as_secs()
            ),
            Self::TooNew { found, known } => write!(
                f,
                "the database has schema version {found}, this release knows up to {known}: \
                 run the newer release"
            ),
            Self::Migration(_) => f.write_str("the schema could not be brought up to date"),
        }
    }
}

impl std::error::Error for MigrateError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Connection(source) => Some(source),
            Self::Migration(source) => Some(source),
            _ => None,
        }
    }
}

impl From<sqlx::Error> for MigrateError {
    fn from(error: sqlx::Error) -> Self {
        Self::Connection(error)
    }
}

/// The newest schema version of this release.
#[must_use]
pub fn schema_version() -> i32 {
    files::migrations::runner().get_migrations().iter().map(Migration::version).max().unwrap_or(0)
}

/// Brings the schema up to date, one replica at a time. The names of what was applied.
pub async fn migrate(options: &PgConnectOptions) -> Result<Vec<String>, MigrateError> {
    tokio::time::timeout(DEADLINE, run(options)).await.map_err(|_| MigrateError::TookTooLong)?
}

async fn run(options: &PgConnectOptions) -> Result<Vec<String>, MigrateError> {
    let options = bare(options.clone()).application_name("taskwire migrate");
    let mut connection = options.connect().await?;
    refuse_pooler(&mut connection, &options).await?;
    connection.execute(SESSION).await?;
    let standby: bool = connection.fetch_one("select pg_is_in_recovery()").await?.try_get(0)?;
    if standby {
        return Err(MigrateError::Standby);
    }
    lock(&mut connection).await?;
    let result = apply(&mut connection).await;
    // The lock goes with the session, whatever happened.
    let _ = connection.close().await;
    result
}

/// A connection that is a session has a process of its own in Postgres, always the same one. A pooler
/// in transaction mode gives the process of a connection that rests to the next transaction. (One that
/// is busy may hide it by chance; then the listener's canary does not come back.)
async fn refuse_pooler(
    connection: &mut PgConnection,
    options: &PgConnectOptions,
) -> Result<(), MigrateError> {
    const PROCESS: &str = "select pg_backend_pid()";
    let process: i32 = connection.fetch_one(PROCESS).await?.try_get(0)?;
    let mut other = options.connect().await?;
    other.execute("begin").await?;
    let others: i32 = other.fetch_one(PROCESS).await?.try_get(0)?;
    // Through a pooler with a single connection this would wait for the other's end.
    let again = tokio::time::timeout(PROBE_WAIT, connection.fetch_one(PROCESS)).await;
    let again: Option<i32> = again.ok().transpose()?.map(|row| row.try_get(0)).transpose()?;
    let _ = other.close().await;
    let is_session = process != others && again == Some(process);
    is_session.then_some(()).ok_or(MigrateError::Pooler)
}

/// Waits by asking: a session that waits inside Postgres holds a snapshot open for all that time.
async fn lock(connection: &mut PgConnection) -> Result<(), MigrateError> {
    loop {
        let locked: bool = sqlx::query_scalar("select pg_try_advisory_lock($1)")
            .bind(ADVISORY_LOCK)
            .fetch_one(&mut *connection)
            .await?;
        if locked {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn apply(connection: &mut PgConnection) -> Result<Vec<String>, MigrateError> {
    refuse_newer(connection).await?;
    let mut applied = Vec::new();
    for tries in 1.. {
        match files::migrations::runner().run_async(&mut Session(connection)).await {
            Ok(report) => {
                applied.extend(report.applied_migrations().iter().map(ToString::to_string));
                return Ok(applied);
            }
            Err(error) if tries < LOCK_TRIES_MAX && met_a_lock(&error) => {
                if let Some(report) = error.report() {
                    applied.extend(report.applied_migrations().iter().map(ToString::to_string));
                }
                tracing::warn!(tries, "a migration met a locked table, trying again");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            Err(error) => return Err(MigrateError::Migration(error)),
        }
    }
    Ok(applied)
}

async fn refuse_newer(connection: &mut PgConnection) -> Result<(), MigrateError> {
    let known = schema_version();
    let has_history: bool = connection
        .fetch_one("select to_regclass('refinery_schema_history') is not null")
        .await?
        .try_get(0)?;
    if has_history {
        let found: i32 = connection
            .fetch_one("select coalesce(max(version), 0) from refinery_schema_history")
            .await?
            .try_get(0)?;
        if found > known {
            return Err(MigrateError::TooNew { found, known });
        }
    }
    Ok(())
}

fn met_a_lock(error: &refinery::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(sqlx::Error::Database(error)) = error.downcast_ref() {
            // lock_not_available, deadlock_detected
            return error.code().is_some_and(|code| ["55P03", "40P01"].contains(&&*code));
        }
        cause = error.source();
    }
    false
}

/// refinery's view of our connection.
struct Session<'c>(&'c mut PgConnection);

impl AsyncTransaction for Session<'_> {
    type Error = sqlx::Error;

    async fn execute<'a, T: Iterator<Item = &'a str> + Send + 'a>(
        &'a mut self,
        queries: T,
    ) -> Result<usize, Self::Error> {
        let mut transaction = self.0.begin().await?;
        let mut count = 0;
        for query in queries {
            // Files of this crate, and refinery's own bookkeeping: nothing that a user wrote.
            sqlx::raw_sql(AssertSqlSafe(query)).execute(&mut *transaction).await?;
            count += 1;
        }
        transaction.commit().await?;
        Ok(count)
    }
}

impl AsyncQuery<Vec<Migration>> for Session<'_> {
    async fn query<'a>(&'a mut self, query: &'a str) -> Result<Vec<Migration>, Self::Error> {
        let bad = |version: i32, what: &str| {
            sqlx::Error::Decode(
                format!("row {version} of refinery_schema_history has no valid {what}; was it edited by hand?")
                    .into(),
            )
        };
        let rows = sqlx::raw_sql(AssertSqlSafe(query)).fetch_all(&mut *self.0).await?;
        rows.into_iter()
            .map(|row| {
                let version: i32 = row.try_get(0)?;
                let name: Option<String> = row.try_get(1)?;
                let applied_on: Option<String> = row.try_get(2)?;
                let checksum: Option<String> = row.try_get(3)?;
                Ok(Migration::applied(
                    version,
                    name.ok_or_else(|| bad(version, "name"))?,
                    applied_on
                        .and_then(|text| OffsetDateTime::parse(&text, &Rfc3339).ok())
                        .ok_or_else(|| bad(version, "applied_on"))?,
                    checksum
                        .and_then(|text| text.parse().ok())
                        .ok_or_else(|| bad(version, "checksum"))?,
                ))
            })
            .collect()
    }
}

impl refinery_core::AsyncMigrate for Session<'_> {}
