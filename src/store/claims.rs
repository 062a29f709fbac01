//! Claims and cancellations.

use std::collections::HashMap;
use std::time::Duration;

use uuid::Uuid;

use super::group::Batch;
use super::json::Lenient;
use super::late::Lost;
use super::link::Link;
use super::{Store, StoreError};
use crate::domain::{Status, Task, TaskId, WorkerId};

/// Pauses of a claim with a `claim_id` while somebody else changes its row: 1.3 s in all.
const LOCKED_PAUSES_MS: [u64; 8] = [5, 10, 20, 40, 80, 160, 320, 640];

/// Who claims what.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "named as in the protocol")]
pub struct ClaimAsk {
    pub task_id: TaskId,
    pub worker_id: WorkerId,
    pub claim_id: Option<Uuid>,
}

/// A claim that was won.
#[derive(Debug)]
pub struct Claimed {
    /// The whole task; its `claim_epoch` is the fencing token.
    pub task: Task,
    /// How long the claim lives without a sign of life.
    pub lease: Duration,
}

impl Claimed {
    /// A lease ends with the timeout of the attempt, if that is shorter.
    pub(super) fn new(task: Task, lease: Duration) -> Self {
        let timeout = task.timeout_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let lease = timeout.map_or(lease, |seconds| lease.min(Duration::from_secs(seconds)));
        Self { task, lease }
    }
}

/// What became of a claim. Losing is an everyday answer here, not an error.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "the large one is the usual one")]
pub enum Claim {
    /// This worker owns the task from now on, or did already by this very `claim_id`.
    Claimed(Claimed),
    /// Somebody else was faster.
    Taken {
        /// Who, if that is known yet.
        by: Option<String>,
    },
    /// This claim was made before, and is over.
    Over(Lost),
    /// The task has ended.
    Ended(Status),
    /// Its `run_at` has not come.
    NotDue,
    /// Its `expires_at` is over.
    Expired,
    /// It is not for this worker.
    NotRouted,
    /// Nobody knows this worker.
    UnknownWorker,
    /// There is no such task.
    NotFound,
}

/// What became of a cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// It has ended, now or before.
    Ended,
    /// It is running; its owner is told.
    Requested,
    /// It had ended before, otherwise.
    Before(Status),
    /// There is no such task.
    NotFound,
}

impl Store {
    /// Claims one task. Of any number of racing callers on any number of replicas one wins.
    pub async fn task_claim(&self, ask: ClaimAsk) -> Result<Claim, StoreError> {
        let mut pauses = LOCKED_PAUSES_MS.into_iter();
        loop {
            let claim = self.0.claim.submit(ask.clone()).await?;
            if !matches!(claim, Claim::Taken { by: None }) || ask.claim_id.is_none() {
                return Ok(claim);
            }
            // Somebody is changing the row this moment, and it may be this very claim: sent before, over
            // a connection that broke, and not committed yet. "Taken" would have its worker forget a task
            // that its own stream then keeps for it. So it is asked again until the row says who has it,
            // and in the end the worker is to send it again.
            let pause = pauses.next().ok_or_else(StoreError::locked)?;
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    /// Calls a task off.
    pub async fn task_cancel(
        &self,
        id: TaskId,
        reason: Option<&str>,
    ) -> Result<Cancelled, StoreError> {
        let row = sqlx::query_file!("src/store/sql/task_cancel.sql", id.0, reason)
            .fetch_one(self.link())
            .await?;
        Ok(match row.status.as_deref().and_then(Status::parse) {
            None => Cancelled::NotFound,
            Some(Status::Running) => Cancelled::Requested,
            Some(Status::Cancelled) => Cancelled::Ended,
            Some(before) => Cancelled::Before(before),
        })
    }
}

/// Claims that share a statement.
pub(super) struct ClaimBatch {
    pub(super) link: Link,
    pub(super) lease: Duration,
}

impl Batch for ClaimBatch {
    type Op = ClaimAsk;
    type Out = Claim;

    async fn run(&self, ops: &[ClaimAsk]) -> Result<Vec<Result<Claim, StoreError>>, StoreError> {
        let mut answers: Vec<Option<Result<Claim, StoreError>>> =
            ops.iter().map(|_| None).collect();
        // Of several claims of one worker and task, the answers could not be told apart: those by another
        // claim_id than the first one are asked again (`task_claim`), or have lost.
        let mut first = HashMap::new();
        for (n, op) in ops.iter().enumerate() {
            let at = *first.entry((op.task_id, op.worker_id.as_str())).or_insert(n);
            if ops[at].claim_id != op.claim_id {
                answers[n] = Some(Ok(Claim::Taken { by: None }));
            }
        }
        let asked = (0..ops.len()).filter(|n| answers[*n].is_none());
        let (tasks, workers, claims) = columns(asked.map(|n| &ops[n]));
        let won = sqlx::query_file_as!(
            Task,
            "src/store/sql/task_claim.sql",
            &tasks,
            &workers as &[&str],
            &claims as &[Option<Uuid>],
            self.lease.as_secs_f64(),
        )
        .fetch_all(&self.link)
        .await?;
        for task in won {
            // A task has one winner, and of a worker's several asks the first one wins.
            let worker = task.claimed_by.as_deref().unwrap_or_default();
            if let Some(n) = first.get(&(task.id, worker)).copied() {
                answers[n] = Some(Ok(Claim::Claimed(Claimed::new(task, self.lease))));
            }
        }

        let lost: Vec<usize> = (0..ops.len()).filter(|n| answers[*n].is_none()).collect();
        if !lost.is_empty() {
            match self.explain(ops, &lost).await {
                Ok(explained) => {
                    for (n, answer) in lost.iter().zip(explained) {
                        answers[*n] = Some(Ok(answer));
                    }
                }
                // The winners have won all the same.
                Err(error) => {
                    for n in &lost {
                        answers[*n] = Some(Err(error.clone()));
                    }
                }
            }
        }
        Ok(answers.into_iter().map(|answer| answer.unwrap_or(Err(StoreError::Busy))).collect())
    }
}

impl ClaimBatch {
    async fn explain(&self, ops: &[ClaimAsk], lost: &[usize]) -> Result<Vec<Claim>, StoreError> {
        let (tasks, workers, claims) = columns(lost.iter().map(|n| &ops[*n]));
        let rows = sqlx::query_file!(
            "src/store/sql/task_claim_explain.sql",
            &tasks,
            &workers as &[&str],
            &claims as &[Option<Uuid>],
        )
        .fetch_all(&self.link)
        .await?;
        let mut answers: Vec<Claim> = lost.iter().map(|_| Claim::NotFound).collect();
        for row in rows {
            let Some(at) = usize::try_from(row.n - 1).ok().filter(|n| *n < lost.len()) else {
                continue;
            };
            answers[at] = match row.status {
                None => Claim::NotFound,
                Some(_) if !row.worker_known => Claim::UnknownWorker,
                Some(Status::Running) if row.is_repeat => {
                    // The answer to the first one was lost on its way (protocol C2).
                    let ClaimAsk { task_id, worker_id, claim_id } = &ops[lost[at]];
                    let id = claim_id.unwrap_or_default();
                    let held = claimed_as(&self.link, worker_id, id, Some(*task_id)).await?;
                    // Not any more, a moment later: as good as lost.
                    held.into_iter().next().map_or(Claim::Taken { by: None }, |task| {
                        Claim::Claimed(Claimed::new(task, self.lease))
                    })
                }
                Some(status) if row.outcome.is_some() => Claim::Over(Lost {
                    status,
                    claimed_by: row.claimed_by,
                    claim_epoch: row.claim_epoch.unwrap_or_default(),
                    outcome: row.outcome,
                }),
                Some(Status::Running) => Claim::Taken { by: row.claimed_by },
                Some(Status::Pending) if !row.routed => Claim::NotRouted,
                Some(Status::Pending) if row.expired => Claim::Expired,
                Some(Status::Pending) if !row.due => Claim::NotDue,
                // Claimable a moment ago: a faster one is about to commit.
                Some(Status::Pending) => Claim::Taken { by: None },
                Some(ended) => Claim::Ended(ended),
            };
        }
        Ok(answers)
    }
}

/// What a worker claimed with a `claim_id` and still has: of one task, or of all.
pub(super) async fn claimed_as(
    link: &Link,
    worker: &WorkerId,
    claim_id: Uuid,
    task: Option<TaskId>,
) -> Result<Vec<Task>, StoreError> {
    Ok(sqlx::query_file_as!(
        Task,
        "src/store/sql/task_claimed_as.sql",
        worker.as_str(),
        claim_id,
        task.map(|id| id.0) as Option<Uuid>,
    )
    .fetch_all(link)
    .await?)
}

fn columns<'a>(
    ops: impl Iterator<Item = &'a ClaimAsk>,
) -> (Vec<Uuid>, Vec<&'a str>, Vec<Option<Uuid>>) {
    let (tasks, rest): (Vec<_>, Vec<_>) =
        ops.map(|op| (op.task_id.0, (op.worker_id.as_str(), op.claim_id))).unzip();
    let (workers, claims) = rest.into_iter().unzip();
    (tasks, workers, claims)
}
