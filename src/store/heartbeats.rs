//! Heartbeats: signs of life of single claims, and what their workers say of the work.

use std::time::Duration;

use serde_json::Value;

use super::fences::Fences;
use super::group::Batch;
use super::late::{self, Late, Lost};
use super::link::Link;
use super::{Store, StoreError};
use crate::domain::Fence;

/// When the heartbeats of rows that somebody has locked are tried again.
const LOCKED_RETRY: Duration = Duration::from_millis(50);

/// A sign of life of one claim. What is not given stays as it was.
#[derive(Debug)]
pub struct HeartbeatAsk {
    /// The claim.
    pub fence: Fence,
    /// How far the work is, 0 to 1.
    pub progress: Option<f64>,
    /// What there is to say of it.
    pub message: Option<String>,
    /// Where the next attempt can go on.
    pub checkpoint: Option<Value>,
}

/// What became of a heartbeat.
#[derive(Clone, Debug)]
pub enum Heartbeat {
    /// The claim lives.
    Alive {
        /// For so long, without another sign of life.
        lease: Duration,
        /// Whether the worker is asked to stop.
        cancel_requested: bool,
        /// Which claim it is.
        claim_epoch: i64,
    },
    /// The claim is over.
    Lost(Lost),
    /// There is no such task.
    NotFound,
}

impl Store {
    /// Keeps a claim alive; only its present owner can.
    pub async fn task_heartbeat(&self, ask: HeartbeatAsk) -> Result<Heartbeat, StoreError> {
        self.0.heartbeat.submit(ask).await
    }
}

/// Heartbeats that share a statement.
pub(super) struct HeartbeatBatch {
    pub(super) link: Link,
    pub(super) lease: Duration,
}

impl Batch for HeartbeatBatch {
    type Op = HeartbeatAsk;
    type Out = Heartbeat;

    fn weight_bytes(op: &HeartbeatAsk) -> usize {
        256 + op.message.as_ref().map_or(0, String::len)
            + op.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.to_string().len())
    }

    async fn run(
        &self,
        ops: &[HeartbeatAsk],
    ) -> Result<Vec<Result<Heartbeat, StoreError>>, StoreError> {
        let all: Vec<_> = ops.iter().collect();
        let mut answers = self.beat(&all).await?;
        let is_locked = |n: &usize| matches!(answers[*n], Err(StoreError::Contended(_)));
        let locked: Vec<_> = (0..ops.len()).filter(is_locked).collect();
        if !locked.is_empty() {
            // By a statement that is about to commit, most often. Whose row an operator has locked is
            // told to come back.
            tokio::time::sleep(LOCKED_RETRY).await;
            let again: Vec<_> = locked.iter().map(|n| &ops[*n]).collect();
            if let Ok(second) = self.beat(&again).await {
                for (n, answer) in locked.into_iter().zip(second) {
                    answers[n] = answer;
                }
            }
        }
        Ok(answers)
    }
}

impl HeartbeatBatch {
    async fn beat(
        &self,
        ops: &[&HeartbeatAsk],
    ) -> Result<Vec<Result<Heartbeat, StoreError>>, StoreError> {
        let fences: Fences<'_> = ops.iter().map(|op| &op.fence).collect();
        let progress: Vec<_> = ops.iter().map(|op| op.progress).collect();
        let messages: Vec<_> = ops.iter().map(|op| op.message.as_deref()).collect();
        let checkpoints: Vec<_> = ops.iter().map(|op| op.checkpoint.as_ref()).collect();
        let rows = sqlx::query_file!(
            "src/store/sql/task_heartbeat.sql",
            &fences.tasks,
            &fences.workers as &[&str],
            &fences.epochs as &[Option<i64>],
            &progress as &[Option<f64>],
            &messages as &[Option<&str>],
            &checkpoints as &[Option<&Value>],
            self.lease.as_secs_f64(),
        )
        .fetch_all(&self.link)
        .await?;
        let mut answers: Vec<Option<Heartbeat>> = ops.iter().map(|_| None).collect();
        for row in rows {
            if let Some(answer) = usize::try_from(row.n - 1).ok().and_then(|n| answers.get_mut(n)) {
                *answer = Some(Heartbeat::Alive {
                    lease: Duration::try_from_secs_f64(row.lease_expires_in).unwrap_or_default(),
                    cancel_requested: row.cancel_requested,
                    claim_epoch: row.claim_epoch,
                });
            }
        }
        let lost: Vec<_> = (0..ops.len()).filter(|n| answers[*n].is_none()).collect();
        let calls: Vec<_> = lost.iter().map(|n| (&ops[*n].fence, false)).collect();
        let mut explained = late::explain(&self.link, &calls).await.map(Vec::into_iter);
        Ok(answers
            .into_iter()
            .map(|answer| match (answer, &mut explained) {
                (Some(answer), _) => Ok(answer),
                // Those that live do so all the same.
                (None, Err(error)) => Err(error.clone()),
                (None, Ok(explained)) => match explained.next() {
                    Some(Late::Lost(lost)) => Ok(Heartbeat::Lost(lost)),
                    Some(Late::Locked) => Err(StoreError::locked()),
                    // Only a complete can be a repetition.
                    Some(Late::NotFound | Late::Repeats(_)) | None => Ok(Heartbeat::NotFound),
                },
            })
            .collect())
    }
}
