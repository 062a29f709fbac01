//! The only SQL. Each statement that is part of the protocol is a file under `sql/`, headed by its
//! name and the question it answers; the methods here are named noun first, after them.
//!
//! Outcomes, not booleans: losing a race is an everyday answer, not an error.

mod claims;
mod error;
mod fences;
mod finishes;
mod group;
mod heartbeats;
mod late;
mod maintenance;
pub mod migrate;
mod nexts;
mod pushes;
mod streams;
mod tasks;
mod workers;

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgListener, PgPool, PgPoolOptions};

pub use claims::{Cancelled, Claim, ClaimAsk, Claimed};
pub use error::{StoreError, chain, report};
pub use finishes::{Finish, FinishAsk, Finished, Verb};
pub use heartbeats::{Heartbeat, HeartbeatAsk};
pub use late::Lost;
pub use maintenance::Reaped;
pub use nexts::{Next, NextAsk};
pub use pushes::{Cancellation, PushTask, Ready, Still};
pub use streams::{Opened, Review, StreamAsk};
pub use tasks::{Attempt, Create, CreateAsk, TaskFilter, TaskSummary, TaskView};
pub use workers::{Held, Registration, SeenWorker, Unregistered, WorkerState};

use group::Group;

/// Connections in the pool of a replica. Group commit needs few; the rest serve reads.
const POOL_CONNECTIONS_MAX: u32 = 20;
/// Connections that are kept open, so that a first burst does not wait for handshakes.
const POOL_CONNECTIONS_MIN: u32 = 4;
/// How long a request waits for a connection: within it an answer must leave (protocol E3).
const POOL_WAIT: Duration = Duration::from_millis(900);
/// A statement that runs longer is ended by Postgres.
const STATEMENT_TIMEOUT: &str = "10s";
/// A statement that waits longer for a lock, as behind an operator's open transaction, is ended.
const LOCK_TIMEOUT: &str = "2s";
/// A replica that was silent for so long is gone, and its streams with it.
pub const REPLICA_SILENCE: Duration = Duration::from_secs(15);
/// The one channel of all notifications; see migrations/V3.
pub const CHANNEL: &str = "taskwire";

/// What of the settings Postgres needs to know.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// How long a claim lives without a sign of life from its owner.
    pub lease: Duration,
    /// After how much silence a worker is no longer connected.
    pub worker_timeout: Duration,
}

/// A silence of all replicas that is no outage yet: they show a sign of life every second.
const GAP_MIN: Duration = Duration::from_secs(3);

impl Times {
    /// A silence of all replicas that may have cost leases: after it everyone gets a full one anew. Half
    /// a lease, as who sends three heartbeats a lease may have sent the last one a third of it before.
    fn gap(self) -> Duration {
        (self.lease / 2).clamp(GAP_MIN, REPLICA_SILENCE)
    }
}

/// Postgres, as the rest of the server sees it. Cheap to clone.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    pool: PgPool,
    listen: PgConnectOptions,
    times: Times,
    create: Group<tasks::CreateBatch>,
    claim: Group<claims::ClaimBatch>,
    heartbeat: Group<heartbeats::HeartbeatBatch>,
    finish: Group<finishes::FinishBatch>,
    open: Group<streams::OpenBatch>,
}

/// Reads a `DATABASE_URL`. The error names no password.
pub fn parse_url(url: &str) -> Result<PgConnectOptions, StoreError> {
    Ok(PgConnectOptions::from_str(url)?)
}

impl Store {
    /// Makes the pool; connects when first used.
    #[must_use]
    pub fn new(database: PgConnectOptions, listen: PgConnectOptions, times: Times) -> Self {
        let options = database.application_name("taskwire").options([
            ("statement_timeout", STATEMENT_TIMEOUT),
            ("lock_timeout", LOCK_TIMEOUT),
            // Statements here are short; compiling one would take longer than running it.
            ("jit", "off"),
            // Nor are there rows enough to share: a plan with helpers waits until they have started.
            ("max_parallel_workers_per_gather", "0"),
            ("idle_in_transaction_session_timeout", STATEMENT_TIMEOUT),
        ]);
        let pool = PgPoolOptions::new()
            .max_connections(POOL_CONNECTIONS_MAX)
            .min_connections(POOL_CONNECTIONS_MIN)
            .acquire_timeout(POOL_WAIT)
            .connect_lazy_with(options);
        Self(Arc::new(Inner {
            create: Group::start(tasks::CreateBatch { pool: pool.clone() }),
            claim: Group::start(claims::ClaimBatch { pool: pool.clone(), lease: times.lease }),
            heartbeat: Group::start(heartbeats::HeartbeatBatch {
                pool: pool.clone(),
                lease: times.lease,
            }),
            finish: Group::start(finishes::FinishBatch { pool: pool.clone() }),
            open: Group::start(streams::OpenBatch { pool: pool.clone() }),
            listen: listen.application_name("taskwire listener"),
            pool,
            times,
        }))
    }

    fn pool(&self) -> &PgPool {
        &self.0.pool
    }

    /// How long claims and silence last.
    #[must_use]
    pub fn times(&self) -> Times {
        self.0.times
    }

    /// A connection of its own that listens on the channel. It is to be thrown away on any trouble:
    /// it could reconnect by itself, but then not every gap is visible from outside.
    pub async fn listen(&self) -> Result<PgListener, StoreError> {
        let own = PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(Duration::from_secs(5))
            .connect_lazy_with(self.0.listen.clone());
        let mut listener = PgListener::connect_with(&own).await?;
        listener.ignore_pool_close_event(true);
        listener.eager_reconnect(false);
        listener.listen(CHANNEL).await?;
        Ok(listener)
    }

    /// Sends a canary through Postgres to whoever listens.
    pub async fn notify_canary(&self, payload: &str) -> Result<(), StoreError> {
        sqlx::query!("select pg_notify($1, $2)", CHANNEL, payload).execute(self.pool()).await?;
        Ok(())
    }

    /// Whether Postgres answers, whether it is a standby, and the version of its schema.
    pub async fn ready(&self) -> Result<(bool, i32), StoreError> {
        let row = sqlx::query_file!("src/store/sql/ready.sql").fetch_one(self.pool()).await?;
        Ok((row.is_standby, row.schema_version))
    }

    /// Whether the insert trigger is there and on, as `worker_sse` logs at the start.
    pub async fn trigger_is_on(&self) -> Result<bool, StoreError> {
        let on = sqlx::query_scalar!(
            r#"
            -- trigger_is_on
            select exists (select 1 from pg_trigger
                            where tgrelid = 'tasks'::regclass and tgname = 'tasks_notify_inserted'
                              and tgenabled in ('O', 'A')) as "on!"
            "#
        )
        .fetch_one(self.pool())
        .await?;
        Ok(on)
    }

    /// Lets the connections go.
    pub async fn close(&self) {
        self.pool().close().await;
    }
}
