//! Claims of whatever is best, for workers that cannot hold a stream.

use uuid::Uuid;

use super::claims::{Claimed, claimed_as};
use super::json::Lenient;
use super::{Store, StoreError};
use crate::domain::{Task, WorkerId};

/// Candidates that are read beyond those that are wanted: rivals take some of them meanwhile.
const CANDIDATES_SPARE: i64 = 64;
/// How many candidates are read for each that is wanted.
const CANDIDATES_PER_TASK: i64 = 3;
/// Bytes of prompts and metadata that one call gets, about: the first task comes whatever its size.
const CLAIM_BYTES_MAX: i64 = 4 * 1024 * 1024;

/// Who claims, how many, and by which claim.
#[derive(Clone, Debug)]
pub struct NextAsk {
    /// The worker.
    pub worker_id: WorkerId,
    /// How many tasks at most.
    pub count: i64,
    /// Makes the call repeatable.
    pub claim_id: Option<Uuid>,
}

/// What became of such a claim.
#[derive(Debug)]
pub enum Next {
    /// The tasks, best first; none if there are none, or if nobody knows the worker.
    Claimed(Vec<Claimed>),
    /// What was claimed with this `claim_id` has ended.
    Spent,
}

impl Store {
    /// Claims the best tasks that there are for a worker. Repeated with its `claim_id` it gives what the
    /// first call got and the worker still has.
    pub async fn task_claim_next(&self, ask: &NextAsk) -> Result<Next, StoreError> {
        let lease = self.times().lease;
        let mut tasks = sqlx::query_file_as!(
            Task,
            "src/store/sql/task_claim_next.sql",
            ask.worker_id.as_str(),
            ask.count,
            ask.claim_id,
            lease.as_secs_f64(),
            ask.count * CANDIDATES_PER_TASK + CANDIDATES_SPARE,
            CLAIM_BYTES_MAX,
        )
        .fetch_all(self.link())
        .await?;
        if let (true, Some(claim_id)) = (tasks.is_empty(), ask.claim_id) {
            tasks = claimed_as(self.link(), &ask.worker_id, claim_id, None).await?;
            if tasks.is_empty() && self.claim_id_is_spent(&ask.worker_id, claim_id).await? {
                return Ok(Next::Spent);
            }
        }
        tasks.sort_by_key(|task| (std::cmp::Reverse(task.priority), task.created_at, task.id.0));
        Ok(Next::Claimed(tasks.into_iter().map(|task| Claimed::new(task, lease)).collect()))
    }

    async fn claim_id_is_spent(&self, worker: &WorkerId, id: Uuid) -> Result<bool, StoreError> {
        let spent = sqlx::query_scalar!(
            r#"
            -- claim_id_is_spent
            select exists (select 1 from attempts where worker_id = $1 and claim_id = $2) as "spent!"
            "#,
            worker.as_str(),
            id
        )
        .fetch_one(self.link())
        .await?;
        Ok(spent)
    }
}
