//! How claims end: completed, failed, released.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::Value;
use sqlx::PgPool;

use super::group::Batch;
use super::{Store, StoreError};
use crate::domain::{Status, TaskId, WorkerId};

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

impl Store {
    /// Ends a claim; only its present owner can.
    pub async fn task_finish(&self, ask: FinishAsk) -> Result<Finish, StoreError> {
        self.0.finish.submit(ask).await
    }
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
