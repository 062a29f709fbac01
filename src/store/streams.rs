//! Presence: streams, and the replicas that vouch for them.

use std::time::Duration;

use uuid::Uuid;

use super::group::Batch;
use super::link::Link;
use super::{REPLICA_SILENCE, Store, StoreError};
use crate::domain::fanout::Place;
use crate::domain::{ConnectionId, ReplicaId, Routing, WorkerId};

/// A replica that was silent for so long is not counted on to offer tasks. It shows a sign of life every
/// second.
const REPLICA_DOUBT: Duration = Duration::from_secs(4);

/// A worker that connects. `None` leaves what is known of it as it is.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "named as in the protocol")]
pub struct StreamAsk {
    pub worker_id: WorkerId,
    pub name: Option<String>,
    pub codebases: Option<Vec<String>>,
    pub capabilities: Option<Vec<String>>,
    pub connection_id: ConnectionId,
    pub replica_id: ReplicaId,
    /// `None`: the worker claims by itself.
    pub slots: Option<i32>,
}

/// What became of a connect.
#[derive(Debug)]
pub enum Opened {
    /// Present, with this routing.
    Open(Routing),
    /// A newer stream of the same worker came in the very same moment.
    Superseded,
}

/// What has become of a stream's worker.
#[derive(Debug)]
pub struct Review {
    /// Which stream owns the worker's presence now.
    pub connection_id: Option<ConnectionId>,
    /// How the worker is routed now; `None`: it is no longer registered.
    pub routing: Option<Routing>,
}

impl Store {
    /// Makes this connection the one stream of its worker.
    pub async fn stream_open(&self, ask: StreamAsk) -> Result<Opened, StoreError> {
        self.0.open.submit(ask).await
    }

    /// Ends the presence of some connections; newer ones of the same workers are not touched.
    pub async fn stream_close(
        &self,
        streams: &[(WorkerId, ConnectionId)],
    ) -> Result<(), StoreError> {
        let (workers, connections) = columns(streams);
        sqlx::query_file!("src/store/sql/stream_close.sql", &workers as &[&str], &connections)
            .execute(self.link())
            .await?;
        Ok(())
    }

    /// What has become of some workers' streams and routing, in the order of the workers.
    pub async fn stream_review(&self, workers: &[WorkerId]) -> Result<Vec<Review>, StoreError> {
        let ids: Vec<_> = workers.iter().map(WorkerId::as_str).collect();
        let mut rows = sqlx::query_file!("src/store/sql/stream_review.sql", &ids as &[&str])
            .fetch_all(self.link())
            .await?;
        rows.sort_unstable_by_key(|row| row.n);
        Ok(rows
            .into_iter()
            .zip(workers)
            .map(|(row, worker)| Review {
                connection_id: row.connection_id,
                routing: row.name.map(|name| Routing {
                    worker_id: worker.clone(),
                    name,
                    codebases: row.codebases.unwrap_or_default(),
                    capabilities: row.capabilities.unwrap_or_default(),
                }),
            })
            .collect())
    }

    /// Gives streams of this replica that have no presence their rows back.
    pub async fn stream_restore(
        &self,
        replica: ReplicaId,
        streams: &[(WorkerId, ConnectionId, Option<i32>)],
    ) -> Result<(), StoreError> {
        let workers: Vec<_> = streams.iter().map(|(worker, ..)| worker.as_str()).collect();
        let connections: Vec<_> = streams.iter().map(|(_, connection, _)| connection.0).collect();
        let slots: Vec<_> = streams.iter().map(|(.., slots)| *slots).collect();
        sqlx::query_file!(
            "src/store/sql/stream_restore.sql",
            &workers as &[&str],
            &connections,
            replica.0,
            &slots as &[Option<i32>]
        )
        .execute(self.link())
        .await?;
        Ok(())
    }

    /// A replica's sign of life. True: the others did not know it (any more).
    pub async fn replica_heartbeat(
        &self,
        id: ReplicaId,
        address: &str,
    ) -> Result<bool, StoreError> {
        let row = sqlx::query_file!(
            "src/store/sql/replica_heartbeat.sql",
            id.0,
            address,
            env!("CARGO_PKG_VERSION"),
            self.times().gap().as_secs_f64()
        )
        .fetch_one(self.link())
        .await?;
        Ok(row.is_new)
    }

    /// Where the streams of a replica stand among those of all that live; `None`: it has none.
    pub async fn replica_place(&self, id: ReplicaId) -> Result<Option<Place>, StoreError> {
        let row =
            sqlx::query_file!("src/store/sql/replica_place.sql", id.0, REPLICA_DOUBT.as_secs_f64())
                .fetch_one(self.link())
                .await?;
        let place = || {
            let [before, own, all] = [row.before, row.own, row.all].map(u64::try_from);
            Place::new(before.ok()?, own.ok()?, all.ok()?)
        };
        Ok(place())
    }

    /// Removes replicas: this one when it leaves, and those that were silent for too long.
    pub async fn replica_leave(&self, id: Option<ReplicaId>) -> Result<u64, StoreError> {
        let done = sqlx::query_file!(
            "src/store/sql/replica_leave.sql",
            id.map(|id| id.0),
            REPLICA_SILENCE.as_secs_f64()
        )
        .execute(self.link())
        .await?;
        Ok(done.rows_affected())
    }
}

fn columns(streams: &[(WorkerId, ConnectionId)]) -> (Vec<&str>, Vec<Uuid>) {
    streams.iter().map(|(worker, connection)| (worker.as_str(), connection.0)).unzip()
}

/// Connects that share a statement, at most.
const OPEN_OPS_MAX: usize = 64;

/// Connects that share a statement.
pub(super) struct OpenBatch {
    pub(super) link: Link,
}

impl Batch for OpenBatch {
    type Op = StreamAsk;
    type Out = Opened;

    /// The statement looks each worker up among those of its batch: a storm of connects is many short
    /// statements, not a few long ones.
    const OPS_MAX: usize = OPEN_OPS_MAX;

    async fn run(&self, ops: &[StreamAsk]) -> Result<Vec<Result<Opened, StoreError>>, StoreError> {
        let join = |list: &Option<Vec<String>>| list.as_ref().map(|ids| ids.join(","));
        let workers: Vec<_> = ops.iter().map(|op| op.worker_id.as_str()).collect();
        let names: Vec<_> = ops.iter().map(|op| op.name.as_deref()).collect();
        let codebases: Vec<_> = ops.iter().map(|op| join(&op.codebases)).collect();
        let capabilities: Vec<_> = ops.iter().map(|op| join(&op.capabilities)).collect();
        let connections: Vec<_> = ops.iter().map(|op| op.connection_id.0).collect();
        let slots: Vec<_> = ops.iter().map(|op| op.slots).collect();
        let Some(replica) = ops.first().map(|op| op.replica_id) else {
            return Ok(Vec::new());
        };
        let rows = sqlx::query_file!(
            "src/store/sql/stream_open.sql",
            &workers as &[&str],
            &names as &[Option<&str>],
            &codebases as &[Option<String>],
            &capabilities as &[Option<String>],
            &connections,
            replica.0,
            &slots as &[Option<i32>],
        )
        .fetch_all(&self.link)
        .await?;
        let answer = |n: usize| {
            // In one batch the worker's last connect is its newest stream.
            if ops[n + 1..].iter().any(|later| later.worker_id == ops[n].worker_id) {
                return Ok(Opened::Superseded);
            }
            let row = rows.iter().find(|row| row.worker_id == ops[n].worker_id);
            row.map(|row| {
                Opened::Open(Routing {
                    worker_id: row.worker_id.clone(),
                    name: row.name.clone(),
                    codebases: row.codebases.clone(),
                    capabilities: row.capabilities.clone(),
                })
            })
            .ok_or(StoreError::Busy)
        };
        Ok((0..ops.len()).map(answer).collect())
    }
}
