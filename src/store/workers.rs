//! Workers: registration and sign of life.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::{REPLICA_SILENCE, Store, StoreError};
use crate::domain::{Asked, ConnectionId, ReplicaId, TaskId, WorkerId};

/// What a worker says of itself. `None` leaves what is known as it is.
#[derive(Debug)]
#[expect(missing_docs, reason = "named as in the protocol")]
pub struct Registration {
    pub worker_id: WorkerId,
    pub name: Option<String>,
    pub codebases: Option<Vec<String>>,
    pub capabilities: Option<Vec<String>>,
    pub hostname: Option<String>,
    pub metadata: Option<Value>,
}

/// A worker with its liveness.
#[derive(Debug)]
#[expect(missing_docs, reason = "named as in the protocol")]
pub struct WorkerState {
    pub id: WorkerId,
    pub name: String,
    pub codebases: Vec<String>,
    pub capabilities: Vec<String>,
    pub hostname: Option<String>,
    pub metadata: Value,
    pub registered_at: DateTime<Utc>,
    /// Its stream, if it has one on a live replica.
    pub connection_id: Option<ConnectionId>,
    pub replica_id: Option<ReplicaId>,
    pub replica_address: Option<String>,
    pub connected_at: Option<DateTime<Utc>>,
    /// The last sign of life, of whatever kind.
    pub last_heartbeat: DateTime<Utc>,
    /// A stream, or a call within the timeout and since its last stream ended.
    pub connected: bool,
}

/// A task that a worker holds.
#[derive(Debug, serde::Serialize)]
#[expect(missing_docs, reason = "named as in the protocol")]
pub struct Held {
    pub id: TaskId,
    pub title: String,
    pub claim_epoch: i64,
    pub claimed_at: DateTime<Utc>,
}

/// A worker that called.
#[derive(Debug)]
pub struct SeenWorker {
    /// Which one.
    pub worker_id: WorkerId,
    /// How long ago its last call came.
    pub ago: Duration,
    /// What it asked for last where it has no stream, and how long ago: a task, or whatever was best.
    pub asked: Option<(Asked, Duration)>,
}

impl SeenWorker {
    /// A worker that calls this moment.
    #[must_use]
    pub fn now(worker_id: &WorkerId) -> Self {
        Self { worker_id: worker_id.clone(), ago: Duration::ZERO, asked: None }
    }
}

/// What a worker holds and asks for.
#[derive(Clone, Copy, Debug)]
pub struct WorkerClaims {
    /// Whether it holds a claim.
    pub holds_any: bool,
    /// How long ago it asked for whatever was best, where it has no stream.
    pub asked_ago: Option<Duration>,
}

/// What became of a farewell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unregistered {
    /// The worker is gone; so many claims were given back.
    Gone(i64),
    /// There was no such worker.
    NotFound,
}

impl Store {
    /// Registers a worker, or changes what is known of it. Its id and name, as they are now.
    pub async fn worker_register(
        &self,
        registration: &Registration,
    ) -> Result<(WorkerId, String), StoreError> {
        let row = sqlx::query_file!(
            "src/store/sql/worker_register.sql",
            registration.worker_id.as_str(),
            registration.name.as_deref(),
            registration.codebases.as_deref(),
            registration.capabilities.as_deref(),
            registration.hostname.as_deref(),
            registration.metadata.as_ref(),
        )
        .fetch_one(self.link())
        .await?;
        Ok((row.id, row.name))
    }

    /// Workers by id: one, those that are connected, or all.
    pub async fn worker_list(
        &self,
        only: Option<&WorkerId>,
        connected_only: bool,
    ) -> Result<Vec<WorkerState>, StoreError> {
        Ok(sqlx::query_file_as!(
            WorkerState,
            "src/store/sql/worker_list.sql",
            only.map(WorkerId::as_str),
            self.times().worker_timeout.as_secs_f64(),
            REPLICA_SILENCE.as_secs_f64(),
            connected_only,
        )
        .fetch_all(&self.link().planned_anew())
        .await?)
    }

    /// What a worker holds now, at most 1,000 tasks.
    pub async fn worker_running(&self, id: &WorkerId) -> Result<Vec<Held>, StoreError> {
        Ok(sqlx::query_file_as!(Held, "src/store/sql/worker_running.sql", id.as_str())
            .fetch_all(self.link())
            .await?)
    }

    /// Replaces a worker's codebases. False: there is no such worker.
    pub async fn worker_set_codebases(
        &self,
        id: &WorkerId,
        codebases: &[String],
    ) -> Result<bool, StoreError> {
        let done =
            sqlx::query_file!("src/store/sql/worker_set_codebases.sql", id.as_str(), codebases)
                .execute(self.link())
                .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Notes calls of some workers, each so long ago. How many of them are registered.
    pub async fn worker_seen(&self, seen: &[SeenWorker]) -> Result<u64, StoreError> {
        let workers: Vec<_> = seen.iter().map(|seen| seen.worker_id.as_str()).collect();
        let ago: Vec<_> = seen.iter().map(|seen| seen.ago.as_secs_f64()).collect();
        let tasks =
            seen.iter().map(|seen| seen.asked.and_then(|(asked, _)| asked.task()).map(|id| id.0));
        let tasks: Vec<_> = tasks.collect();
        let asked_ago: Vec<_> =
            seen.iter().map(|seen| seen.asked.map(|(_, ago)| ago.as_secs_f64())).collect();
        let done = sqlx::query_file!(
            "src/store/sql/worker_seen.sql",
            &workers as &[&str],
            &ago,
            &tasks as &[Option<Uuid>],
            &asked_ago as &[Option<f64>],
        )
        .execute(self.link())
        .await?;
        Ok(done.rows_affected())
    }

    /// What some workers hold and ask for, by their ids.
    pub async fn worker_claims(
        &self,
        ids: &[WorkerId],
    ) -> Result<HashMap<String, WorkerClaims>, StoreError> {
        let ids: Vec<_> = ids.iter().map(WorkerId::as_str).collect();
        let rows = sqlx::query_file!("src/store/sql/worker_claims.sql", &ids as &[&str])
            .fetch_all(self.link())
            .await?;
        let ago = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        let claims = rows.into_iter().map(|row| {
            let asked_ago = row.asked_seconds_ago.map(ago);
            (row.worker_id, WorkerClaims { holds_any: row.holds_any, asked_ago })
        });
        Ok(claims.collect())
    }

    /// A worker's farewell: its claims go back, its stream ends.
    pub async fn worker_unregister(&self, id: &WorkerId) -> Result<Unregistered, StoreError> {
        let row = sqlx::query_file!("src/store/sql/worker_unregister.sql", id.as_str())
            .fetch_one(self.link())
            .await?;
        Ok(if row.gone == 0 { Unregistered::NotFound } else { Unregistered::Gone(row.released) })
    }
}
