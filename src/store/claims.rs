//! A claim's life: won, finished, or called off.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::Value;
use sqlx::PgPool;
use uuid::Uuid;

use super::group::Batch;
use super::{Store, StoreError};
use crate::domain::{Status, Task, TaskId, WorkerId};

/// Who claims what.
#[derive(Debug)]
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

/// How a worker ends its claim.
#[derive(Clone, Debug, PartialEq)]
pub enum Verb {
    /// Done, with its result.
    Complete(Option<Value>),
    /// Failed; again if `retry` and attempts are left, after `retry_after` or the usual backoff.
    Fail {
        /// Why.
        error: Option<String>,
        /// False: this failure is final.
        retry: bool,
        /// Overrides the backoff.
        retry_after: Option<Duration>,
    },
    /// Given back unfinished, at no attempt's cost.
    Release,
    /// Called off by the worker itself (older workers).
    Cancel {
        /// Why.
        error: Option<String>,
    },
}

/// Who ends which claim, and how.
#[derive(Debug)]
#[expect(missing_docs, reason = "named as in the protocol")]
pub struct FinishAsk {
    pub task_id: TaskId,
    pub worker_id: WorkerId,
    /// The fence; not given: whatever claim this worker holds.
    pub claim_epoch: Option<i64>,
    pub verb: Verb,
}

/// Where the task stands after its finish.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "named as in the protocol")]
pub struct Finished {
    pub status: Status,
    pub attempt: i32,
    pub max_attempts: i32,
    pub claim_epoch: i64,
    /// When pending: how long until it may be claimed again.
    pub run_in: Duration,
}

/// What became of a finish.
#[derive(Clone, Debug)]
pub enum Finish {
    /// It took effect, or had already when this is the repetition of a complete.
    Finished(Finished),
    /// The claim is over: another owner, a newer epoch, or an ended task.
    Lost {
        /// What the task is now.
        status: Status,
        /// Whose it is or was last.
        claimed_by: Option<String>,
        /// The epoch of its newest claim.
        claim_epoch: i64,
    },
    /// There is no such task.
    NotFound,
}

/// What became of a cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// It was pending and has ended.
    Ended,
    /// It is running; its owner is told.
    Requested,
    /// It had ended before, like this.
    Before(Status),
    /// There is no such task.
    NotFound,
}

impl Store {
    /// Claims one task. Of any number of racing callers on any number of replicas one wins.
    pub async fn task_claim(&self, ask: ClaimAsk) -> Result<Claim, StoreError> {
        self.0.claim.submit(ask).await
    }

    /// Ends a claim; only its present owner can.
    pub async fn task_finish(&self, ask: FinishAsk) -> Result<Finish, StoreError> {
        self.0.finish.submit(ask).await
    }

    /// Calls a task off.
    pub async fn task_cancel(
        &self,
        id: TaskId,
        reason: Option<&str>,
    ) -> Result<Cancelled, StoreError> {
        let done = sqlx::query_file!("src/store/sql/task_cancel.sql", id.0, reason)
            .fetch_optional(self.pool())
            .await?;
        if let Some(row) = done {
            return Ok(match row.status {
                Status::Running => Cancelled::Requested,
                _ => Cancelled::Ended,
            });
        }
        Ok(match self.task_get(id).await? {
            Some(task) => Cancelled::Before(task.status),
            None => Cancelled::NotFound,
        })
    }
}

/// Claims that share a statement.
pub(super) struct ClaimBatch {
    pub(super) pool: PgPool,
    pub(super) lease: Duration,
}

impl Batch for ClaimBatch {
    type Op = ClaimAsk;
    type Out = Claim;

    async fn run(&self, ops: &[ClaimAsk]) -> Result<Vec<Result<Claim, StoreError>>, StoreError> {
        let mut answers: Vec<Option<Result<Claim, StoreError>>> =
            ops.iter().map(|_| None).collect();
        let (tasks, workers, claims) = columns(ops.iter());
        let won = sqlx::query_file_as!(
            Task,
            "src/store/sql/task_claim.sql",
            &tasks,
            &workers as &[&str],
            &claims as &[Option<Uuid>],
            self.lease.as_secs_f64(),
        )
        .fetch_all(&self.pool)
        .await?;
        for task in won {
            // A task has one winner, and of a worker's several asks the first one wins.
            let winner = ops.iter().position(|op| {
                op.task_id == task.id && task.claimed_by.as_deref() == Some(op.worker_id.as_str())
            });
            if let Some(n) = winner {
                answers[n] = Some(Ok(Claim::Claimed(Claimed { task, lease: self.lease })));
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
        .fetch_all(&self.pool)
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
                    let id = ops[lost[at]].task_id;
                    match sqlx::query_file_as!(Task, "src/store/sql/task_get.sql", id.0)
                        .fetch_optional(&self.pool)
                        .await?
                    {
                        Some(task) => Claim::Claimed(Claimed { task, lease: self.lease }),
                        None => Claim::NotFound,
                    }
                }
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

fn columns<'a>(
    ops: impl Iterator<Item = &'a ClaimAsk>,
) -> (Vec<Uuid>, Vec<&'a str>, Vec<Option<Uuid>>) {
    let (tasks, rest): (Vec<_>, Vec<_>) =
        ops.map(|op| (op.task_id.0, (op.worker_id.as_str(), op.claim_id))).unzip();
    let (workers, claims) = rest.into_iter().unzip();
    (tasks, workers, claims)
}

/// Finishes that share a statement.
pub(super) struct FinishBatch {
    pub(super) pool: PgPool,
}

impl Batch for FinishBatch {
    type Op = FinishAsk;
    type Out = Finish;

    fn weight_bytes(op: &FinishAsk) -> usize {
        256 + match &op.verb {
            Verb::Complete(Some(result)) => result.to_string().len(),
            Verb::Fail { error: Some(error), .. } | Verb::Cancel { error: Some(error) } => {
                error.len()
            }
            _ => 0,
        }
    }

    async fn run(&self, ops: &[FinishAsk]) -> Result<Vec<Result<Finish, StoreError>>, StoreError> {
        let tasks: Vec<_> = ops.iter().map(|op| op.task_id.0).collect();
        let workers: Vec<_> = ops.iter().map(|op| op.worker_id.as_str()).collect();
        let epochs: Vec<_> = ops.iter().map(|op| op.claim_epoch).collect();
        let verbs: Vec<_> = ops.iter().map(|op| op.verb.word()).collect();
        let results: Vec<_> = ops.iter().map(|op| op.verb.result()).collect();
        let errors: Vec<_> = ops.iter().map(|op| op.verb.error()).collect();
        let retries: Vec<_> =
            ops.iter().map(|op| matches!(op.verb, Verb::Fail { retry: true, .. })).collect();
        let waits: Vec<_> = ops
            .iter()
            .map(|op| match op.verb {
                Verb::Fail { retry_after, .. } => retry_after.map(|wait| wait.as_secs_f64()),
                _ => None,
            })
            .collect();
        let rows = sqlx::query_file!(
            "src/store/sql/task_finish.sql",
            &tasks,
            &workers as &[&str],
            &epochs as &[Option<i64>],
            &verbs as &[&str],
            &results as &[Option<&Value>],
            &errors as &[Option<&str>],
            &retries,
            &waits as &[Option<f64>],
        )
        .fetch_all(&self.pool)
        .await?;
        let done: HashMap<usize, Finished> = rows
            .into_iter()
            .filter_map(|row| {
                let finished = Finished {
                    status: row.status,
                    attempt: row.attempt,
                    max_attempts: row.max_attempts,
                    claim_epoch: row.claim_epoch,
                    run_in: Duration::try_from_secs_f64(row.run_in_seconds).unwrap_or_default(),
                };
                Some((usize::try_from(row.n - 1).ok()?, finished))
            })
            .collect();
        let stands = self.explain(ops, &done).await;
        let answer = |n: usize| {
            if let Some(finished) = done.get(&n) {
                return Ok(Finish::Finished(finished.clone()));
            }
            // What took effect took effect, also when the rest cannot be explained.
            let stands = stands.as_ref().map_err(Clone::clone)?;
            Ok(stands.get(&ops[n].task_id).map_or(Finish::NotFound, |stand| stand.answer(&ops[n])))
        };
        Ok((0..ops.len()).map(answer).collect())
    }
}

/// Where a task stands whose finish matched nothing.
struct Stand {
    status: Status,
    claimed_by: Option<String>,
    claim_epoch: i64,
    attempt: i32,
    max_attempts: i32,
}

impl Stand {
    fn answer(&self, op: &FinishAsk) -> Finish {
        let same_claim = self.claimed_by.as_deref() == Some(op.worker_id.as_str())
            && op.claim_epoch.is_none_or(|epoch| epoch == self.claim_epoch);
        if same_claim && self.status == Status::Completed && matches!(op.verb, Verb::Complete(_)) {
            return Finish::Finished(Finished {
                status: self.status,
                attempt: self.attempt,
                max_attempts: self.max_attempts,
                claim_epoch: self.claim_epoch,
                run_in: Duration::ZERO,
            });
        }
        Finish::Lost {
            status: self.status,
            claimed_by: self.claimed_by.clone(),
            claim_epoch: self.claim_epoch,
        }
    }
}

impl FinishBatch {
    async fn explain(
        &self,
        ops: &[FinishAsk],
        done: &HashMap<usize, Finished>,
    ) -> Result<HashMap<TaskId, Stand>, StoreError> {
        let lost: Vec<_> =
            (0..ops.len()).filter(|n| !done.contains_key(n)).map(|n| ops[n].task_id.0).collect();
        if lost.is_empty() {
            return Ok(HashMap::new());
        }
        let rows = sqlx::query_file!("src/store/sql/task_finish_explain.sql", &lost)
            .fetch_all(&self.pool)
            .await?;
        Ok(rows
            .into_iter()
            .map(|row| {
                let stand = Stand {
                    status: row.status,
                    claimed_by: row.claimed_by,
                    claim_epoch: row.claim_epoch,
                    attempt: row.attempt,
                    max_attempts: row.max_attempts,
                };
                (row.id, stand)
            })
            .collect())
    }
}

impl Verb {
    fn word(&self) -> &'static str {
        match self {
            Self::Complete(_) => "complete",
            Self::Fail { .. } => "fail",
            Self::Release => "release",
            Self::Cancel { .. } => "cancel",
        }
    }

    fn result(&self) -> Option<&Value> {
        match self {
            Self::Complete(result) => result.as_ref(),
            _ => None,
        }
    }

    fn error(&self) -> Option<&str> {
        match self {
            Self::Fail { error, .. } | Self::Cancel { error } => error.as_deref(),
            _ => None,
        }
    }
}
