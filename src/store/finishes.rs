//! How claims end: completed, failed, released.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::Value;

use super::fences::Fences;
use super::group::Batch;
use super::late::{self, Late, Lost, Past};
use super::link::Link;
use super::{Store, StoreError};
use crate::domain::{Fence, Status};

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
pub struct FinishAsk {
    /// The claim.
    pub fence: Fence,
    /// How.
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
    Lost(Lost),
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
    pub(super) link: Link,
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
        let fences: Fences<'_> = ops.iter().map(|op| &op.fence).collect();
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
            &fences.tasks,
            &fences.workers as &[&str],
            &fences.epochs as &[Option<i64>],
            &verbs as &[&str],
            &results as &[Option<&Value>],
            &errors as &[Option<&str>],
            &retries,
            &waits as &[Option<f64>],
        )
        .fetch_all(&self.link)
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
        let lost: Vec<_> = (0..ops.len()).filter(|n| !done.contains_key(n)).collect();
        let calls: Vec<_> = lost
            .iter()
            .map(|n| (&ops[*n].fence, matches!(ops[*n].verb, Verb::Complete(_))))
            .collect();
        let mut explained = late::explain(&self.link, &calls).await.map(Vec::into_iter);
        let answer = |n: usize| match (done.get(&n), &mut explained) {
            (Some(finished), _) => Ok(Finish::Finished(finished.clone())),
            // What took effect took effect, also when the rest cannot be explained.
            (None, Err(error)) => Err(error.clone()),
            (None, Ok(explained)) => match explained.next() {
                Some(Late::Lost(lost)) => Ok(Finish::Lost(lost)),
                Some(Late::Repeats(past)) => Ok(Finish::Finished(past.into())),
                // Claimed between the two statements: the next try finds it.
                Some(Late::Locked) => Err(StoreError::locked()),
                Some(Late::NotFound) | None => Ok(Finish::NotFound),
            },
        };
        Ok((0..ops.len()).map(answer).collect())
    }
}

impl From<Past> for Finished {
    fn from(past: Past) -> Self {
        let Past { claim_epoch, attempt, max_attempts } = past;
        let (status, run_in) = (Status::Completed, Duration::ZERO);
        Self { status, attempt, max_attempts, claim_epoch, run_in }
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
