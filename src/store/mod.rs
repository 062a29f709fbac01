//! The only SQL. Each statement that is part of the protocol is a file under `sql/`, headed by its
//! name and the question it answers; the methods here are named noun first, after them.
//!
//! Outcomes, not booleans: losing a race is an everyday answer, not an error.

mod claims;
mod dangers;
mod error;
mod fences;
mod finishes;
mod group;
mod heartbeats;
mod json;
mod late;
mod link;
mod listening;
mod maintenance;
pub mod migrate;
mod nexts;
mod pushes;
mod slots;
mod streams;
mod tasks;
mod workers;

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;

pub use claims::{Cancelled, Claim, ClaimAsk, Claimed};
pub use dangers::{Condition, Danger};
pub use error::{StoreError, chain, report};
pub use finishes::{Finish, FinishAsk, Finished, Verb};
pub use heartbeats::{Heartbeat, HeartbeatAsk};
pub use late::Lost;
pub(crate) use link::SESSION;
pub use listening::Listening;
pub use maintenance::Reaped;
pub use nexts::{Next, NextAsk};
pub use pushes::{Cancellation, PushTask, Ready, Still};
pub use slots::{FreedAsk, HeldClaim};
pub use streams::{Opened, Review, StreamAsk};
pub use tasks::{Attempt, Create, CreateAsk, TaskFilter, TaskSummary, TaskView};
pub use workers::{Held, Registration, SeenWorker, Unregistered, WorkerClaims, WorkerState};

use group::Group;
use link::{Carriage, Link};

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
    link: Link,
    listen: PgConnectOptions,
    times: Times,
    create: Group<tasks::CreateBatch>,
    claim: Group<claims::ClaimBatch>,
    heartbeat: Group<heartbeats::HeartbeatBatch>,
    finish: Group<finishes::FinishBatch>,
    open: Group<streams::OpenBatch>,
    freed: Group<slots::FreedBatch>,
}

/// Reads a `DATABASE_URL`. The error names no password.
pub fn parse_url(url: &str) -> Result<PgConnectOptions, StoreError> {
    Ok(PgConnectOptions::from_str(url)?)
}

impl Store {
    /// Connects when first used. `pooled`: `database` leads through a pooler that may give each
    /// transaction to another session; `listen` never does.
    #[must_use]
    pub fn new(
        database: PgConnectOptions,
        listen: PgConnectOptions,
        pooled: bool,
        times: Times,
    ) -> Self {
        let carriage = if pooled { Carriage::Transactions } else { Carriage::Direct };
        let link = Link::start(database, carriage);
        Self(Arc::new(Inner {
            create: Group::start(tasks::CreateBatch { link: link.clone() }),
            claim: Group::start(claims::ClaimBatch { link: link.clone(), lease: times.lease }),
            heartbeat: Group::start(heartbeats::HeartbeatBatch {
                link: link.clone(),
                lease: times.lease,
            }),
            finish: Group::start(finishes::FinishBatch { link: link.clone() }),
            open: Group::start(streams::OpenBatch { link: link.clone() }),
            freed: Group::start(slots::FreedBatch { link: link.clone() }),
            listen: link::bare(listen).application_name("taskwire listener"),
            link,
            times,
        }))
    }

    fn link(&self) -> &Link {
        &self.0.link
    }

    /// How long claims and silence last.
    #[must_use]
    pub fn times(&self) -> Times {
        self.0.times
    }

    /// A connection of its own that listens on the channel.
    pub async fn listen(&self) -> Result<Listening, StoreError> {
        Listening::start(&self.0.listen, CHANNEL).await
    }

    /// Sends a canary through Postgres to whoever listens.
    pub async fn notify_canary(&self, payload: &str) -> Result<(), StoreError> {
        sqlx::query!("select pg_notify($1, $2)", CHANNEL, payload).execute(self.link()).await?;
        Ok(())
    }

    /// Lets the connections go.
    pub async fn close(&self) {
        self.link().close().await;
    }
}
