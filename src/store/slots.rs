//! Claims that the server makes for workers with slots (protocol S11), and what they hold.

use std::collections::HashSet;

use uuid::Uuid;

use super::claims::Claimed;
use super::group::Batch;
use super::json::Lenient;
use super::link::Link;
use super::{Store, StoreError};
use crate::domain::{ConnectionId, ReplicaId, Task, TaskId, WorkerId};

/// Candidates that are read for each that is wanted: rivals take some of them meanwhile. Who finds none looks
/// whether there are more.
const CANDIDATES_PER_TASK: i64 = 3;
/// The same for all together.
const CANDIDATES_SPARE: i64 = 16;
/// Claims of one worker that are read. It has a thousand slots at most; what is more it claimed by itself.
const HELD_MAX: usize = 4_000;

/// A claim that a worker holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldClaim {
    /// The task.
    pub task_id: TaskId,
    /// Which claim of it.
    pub claim_epoch: i64,
    /// What the claim was made with.
    pub claim_id: Option<Uuid>,
}

/// A claim that a worker has ended where it has no stream, and the one that came in its place.
#[derive(Clone, Debug)]
pub struct FreedAsk {
    /// The worker.
    pub worker_id: WorkerId,
    /// The task of the claim that has ended.
    pub ended: TaskId,
    /// The task that was claimed in the same call.
    pub came: Option<TaskId>,
    /// The replica that says so.
    pub replica_id: ReplicaId,
}

impl Store {
    /// Claims the best tasks that there are for a worker, as `task_claim_next` does and by its statement.
    /// `bytes_max`: of prompts and metadata; the first task comes whatever its size.
    pub async fn slots_claim_next(
        &self,
        worker: &WorkerId,
        count: i64,
        claim_id: Uuid,
        bytes_max: i64,
    ) -> Result<Vec<Claimed>, StoreError> {
        let lease = self.times().lease;
        let mut tasks = sqlx::query_file_as!(
            Task,
            "src/store/sql/task_claim_next.sql",
            worker.as_str(),
            count,
            claim_id,
            lease.as_secs_f64(),
            count * CANDIDATES_PER_TASK + CANDIDATES_SPARE,
            bytes_max,
        )
        .fetch_all(self.link())
        .await?;
        tasks.sort_by_key(|task| (std::cmp::Reverse(task.priority), task.created_at, task.id.0));
        Ok(tasks.into_iter().map(|task| Claimed::new(task, lease)).collect())
    }

    /// What some workers hold, in the order of the workers. `None`: more than is read.
    pub async fn slots_held(
        &self,
        workers: &[WorkerId],
    ) -> Result<Vec<Option<Vec<HeldClaim>>>, StoreError> {
        let ids: Vec<_> = workers.iter().map(WorkerId::as_str).collect();
        let limit = i64::try_from(HELD_MAX).unwrap_or(i64::MAX);
        let rows = sqlx::query_file!("src/store/sql/slots_held.sql", &ids as &[&str], limit)
            .fetch_all(self.link())
            .await?;
        let mut held: Vec<Vec<HeldClaim>> = workers.iter().map(|_| Vec::new()).collect();
        for row in rows {
            if let Some(own) = usize::try_from(row.n - 1).ok().and_then(|n| held.get_mut(n)) {
                let (task_id, claim_epoch, claim_id) = (row.task_id, row.claim_epoch, row.claim_id);
                own.push(HeldClaim { task_id, claim_epoch, claim_id });
            }
        }
        Ok(held.into_iter().map(|own| (own.len() < HELD_MAX).then_some(own)).collect())
    }

    /// Which of some tasks each worker still holds.
    pub async fn slots_check(
        &self,
        asked: &[(WorkerId, TaskId)],
    ) -> Result<Vec<Option<HeldClaim>>, StoreError> {
        let (workers, tasks): (Vec<_>, Vec<_>) =
            asked.iter().map(|(worker, task)| (worker.as_str(), task.0)).unzip();
        let rows = sqlx::query_file!("src/store/sql/slots_check.sql", &workers as &[&str], &tasks)
            .fetch_all(self.link())
            .await?;
        let mut held = vec![None; asked.len()];
        for row in rows {
            if let Some(n) = usize::try_from(row.n - 1).ok().filter(|n| *n < held.len()) {
                let (claim_epoch, claim_id) = (row.claim_epoch, row.claim_id);
                held[n] = Some(HeldClaim { task_id: asked[n].1, claim_epoch, claim_id });
            }
        }
        Ok(held)
    }

    /// Those of some tasks that a worker holds, whole, best first.
    pub async fn slots_tasks(
        &self,
        worker: &WorkerId,
        tasks: &[TaskId],
    ) -> Result<Vec<Claimed>, StoreError> {
        let ids: Vec<_> = tasks.iter().map(|id| id.0).collect();
        let tasks =
            sqlx::query_file_as!(Task, "src/store/sql/slots_tasks.sql", worker.as_str(), &ids)
                .fetch_all(self.link())
                .await?;
        let lease = self.times().lease;
        Ok(tasks.into_iter().map(|task| Claimed::new(task, lease)).collect())
    }

    /// Tells the replica that has the worker's stream, if it has slots.
    pub async fn slots_freed(&self, ask: FreedAsk) -> Result<(), StoreError> {
        self.0.freed.submit(ask).await
    }

    /// Which of some workers have another stream with slots than the one that is named.
    pub async fn slots_elsewhere(
        &self,
        streams: &[(WorkerId, ConnectionId)],
    ) -> Result<HashSet<WorkerId>, StoreError> {
        let (workers, connections): (Vec<_>, Vec<_>) =
            streams.iter().map(|(worker, connection)| (worker.as_str(), connection.0)).unzip();
        let rows = sqlx::query_file_scalar!(
            "src/store/sql/slots_elsewhere.sql",
            &workers as &[&str],
            &connections
        )
        .fetch_all(self.link())
        .await?;
        let worker = |n: i64| Some(streams.get(usize::try_from(n - 1).ok()?)?.0.clone());
        Ok(rows.into_iter().filter_map(worker).collect())
    }
}

/// Hints that share a statement, and so one lock.
pub(super) struct FreedBatch {
    pub(super) link: Link,
}

impl Batch for FreedBatch {
    type Op = FreedAsk;
    type Out = ();

    async fn run(&self, ops: &[FreedAsk]) -> Result<Vec<Result<(), StoreError>>, StoreError> {
        let Some(replica) = ops.first().map(|op| op.replica_id) else {
            return Ok(Vec::new());
        };
        let hint = |op: &FreedAsk| {
            let FreedAsk { worker_id, ended, came, .. } = op;
            match came {
                Some(came) => format!("{worker_id} {ended} {worker_id} +{came}"),
                None => format!("{worker_id} {ended}"),
            }
        };
        let (workers, hints): (Vec<_>, Vec<_>) =
            ops.iter().map(|op| (op.worker_id.as_str(), hint(op))).unzip();
        sqlx::query_file!("src/store/sql/slots_freed.sql", &workers as &[&str], &hints, replica.0)
            .execute(&self.link)
            .await?;
        Ok(ops.iter().map(|_| Ok(())).collect())
    }
}
