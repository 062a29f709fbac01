//! What of Postgres puts a promise at risk. Each is told in `/readyz`, and in the log when it begins
//! and when it ends.

use std::fmt;

use super::migrate::schema_version;
use super::{Store, StoreError};

/// From here on the queue of notifications counts as filling up; it is 8 GB by default.
const QUEUE_USAGE_WARN: f64 = 0.01;

/// One thing that is not as it should be.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "each says itself what it is, below")]
pub enum Danger {
    Standby,
    ReadOnly,
    OldSchema { found: i32, known: i32 },
    TriggerOff,
    QueueFilling { usage: f64 },
    SynchronousCommitOff,
    FsyncOff,
    FullPageWritesOff,
}

impl Danger {
    /// Its name in the metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Standby => "standby",
            Self::ReadOnly => "read_only",
            Self::OldSchema { .. } => "old_schema",
            Self::TriggerOff => "trigger_off",
            Self::QueueFilling { .. } => "notification_queue",
            Self::SynchronousCommitOff => "synchronous_commit_off",
            Self::FsyncOff => "fsync_off",
            Self::FullPageWritesOff => "full_page_writes_off",
        }
    }

    /// Whether requests fail with it. Otherwise they succeed, and a promise is weaker than usual.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        matches!(self, Self::Standby | Self::ReadOnly | Self::OldSchema { .. })
    }

    /// Whether another connection may lead to a better place, as after a failover.
    #[must_use]
    pub fn may_be_elsewhere(&self) -> bool {
        matches!(self, Self::Standby | Self::ReadOnly)
    }
}

impl fmt::Display for Danger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Standby => f.write_str("Postgres is a standby, not the primary"),
            Self::ReadOnly => {
                f.write_str("Postgres is read-only (default_transaction_read_only is on)")
            }
            Self::OldSchema { found, known } => {
                write!(f, "the schema is at version {found}, not {known}")
            }
            Self::TriggerOff => f.write_str(
                "trigger tasks_notify_inserted is missing or disabled: tasks are announced by the \
                 sweep only, within 2 s",
            ),
            Self::QueueFilling { usage } => write!(
                f,
                "the notification queue is {:.1} % full: some session listens in a transaction that \
                 it leaves open; when the queue is full, inserts fail",
                usage * 100.0
            ),
            Self::SynchronousCommitOff => f.write_str(
                "synchronous_commit is off: what is committed by SQL may be lost in a crash of \
                 Postgres (what this server acknowledges is not: it commits with on)",
            ),
            Self::FsyncOff => f.write_str(
                "fsync is off: a crash of the machine may lose acknowledged tasks, or the database",
            ),
            Self::FullPageWritesOff => f.write_str(
                "full_page_writes is off: a crash of the machine may damage the database",
            ),
        }
    }
}

/// How Postgres is.
#[derive(Clone, Debug)]
pub struct Condition {
    /// What is not as it should be.
    pub dangers: Vec<Danger>,
    /// How full the queue of notifications is, 0 to 1.
    pub queue_usage: f64,
    /// The setting that a new session has.
    pub synchronous_commit: String,
    /// How large each of the tables is that grow.
    pub table_bytes: Vec<i64>,
}

impl Store {
    /// Asks Postgres how it is.
    pub async fn condition(&self) -> Result<Condition, StoreError> {
        let row = sqlx::query_file!("src/store/sql/ready.sql").fetch_one(self.link()).await?;
        let (found, known) = (row.schema_version, schema_version());
        let all = [
            (row.is_standby, Danger::Standby),
            // A standby is read-only as well: one reason is enough.
            (row.is_read_only && !row.is_standby, Danger::ReadOnly),
            (found < known, Danger::OldSchema { found, known }),
            (!row.trigger_is_on, Danger::TriggerOff),
            (row.queue_usage >= QUEUE_USAGE_WARN, Danger::QueueFilling { usage: row.queue_usage }),
            (row.synchronous_commit == "off", Danger::SynchronousCommitOff),
            (!row.fsync, Danger::FsyncOff),
            (!row.full_page_writes, Danger::FullPageWritesOff),
        ];
        Ok(Condition {
            dangers: all.into_iter().filter_map(|(is, danger)| is.then_some(danger)).collect(),
            queue_usage: row.queue_usage,
            synchronous_commit: row.synchronous_commit,
            table_bytes: row.table_bytes,
        })
    }

    /// Has all connections made anew, as they are needed.
    pub fn renew_connections(&self) {
        self.link().renew();
    }
}
