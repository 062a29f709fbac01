//! Tasks: create, read, list.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;

use super::group::Batch;
use super::json::Lenient;
use super::link::Link;
use super::{Store, StoreError};
use crate::domain::task::MAX_ATTEMPTS_DEFAULT;
use crate::domain::{NewTask, Status, Task, TaskId};

/// A task to be made.
#[derive(Debug)]
pub struct CreateAsk {
    /// The task, checked.
    pub task: NewTask,
    /// The `Idempotency-Key` and the digest of the body that came with it.
    pub key: Option<(String, Vec<u8>)>,
}

/// What became of a create.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "the large one is the usual one")]
pub enum Create {
    /// A new row.
    Created(Task),
    /// The key was used before with the same body: this is what it made.
    Repeated(TaskId),
    /// The key was used before with another body.
    KeyTaken,
}

/// Which tasks to list.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "each field is the filter of its name")]
pub struct TaskFilter {
    pub status: Option<Status>,
    pub codebase_id: Option<String>,
    pub worker_id: Option<String>,
    pub created_after: Option<DateTime<Utc>>,
    pub created_before: Option<DateTime<Utc>>,
    /// Goes on after this task of the page before.
    pub after: Option<(DateTime<Utc>, TaskId)>,
    pub limit: i64,
}

/// A task in a listing: everything but its large fields.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "`\\d+ tasks` documents each column of this name")]
pub struct TaskSummary {
    pub id: TaskId,
    pub title: String,
    pub status: Status,
    pub codebase_id: String,
    pub priority: i32,
    pub required_capabilities: Vec<String>,
    pub target_worker_id: Option<String>,
    pub target_agent_name: Option<String>,
    pub agent_type: Option<String>,
    pub attempt: i32,
    pub max_attempts: i32,
    pub timeout_seconds: Option<i32>,
    pub claim_epoch: i64,
    pub claimed_by: Option<String>,
    pub created_at: DateTime<Utc>,
    pub run_at: DateTime<Utc>,
    pub expires_at: Option<DateTime<Utc>>,
    pub claimed_at: Option<DateTime<Utc>>,
    pub finished_at: Option<DateTime<Utc>>,
    pub error: Option<String>,
    pub cancel_requested_at: Option<DateTime<Utc>>,
    pub cancel_reason: Option<String>,
    pub progress: Option<f64>,
    pub message: Option<String>,
}

/// One claim of a task, running or ended.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "`\\d+ attempt_history` documents each column of this name")]
pub struct Attempt {
    pub claim_epoch: i64,
    pub attempt: i32,
    pub worker_id: String,
    pub started_at: DateTime<Utc>,
    pub ended_at: Option<DateTime<Utc>>,
    pub outcome: Option<String>,
    pub error: Option<String>,
    pub late_calls: i32,
}

/// Where a task stands, for who follows it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[expect(
    missing_docs,
    reason = "`\\d+ tasks` and `\\d+ heartbeats` document each column of this name"
)]
pub struct TaskView {
    #[serde(rename = "task_id")]
    pub id: TaskId,
    pub status: Status,
    pub attempt: i32,
    pub max_attempts: i32,
    pub claim_epoch: i64,
    pub claimed_by: Option<String>,
    pub run_at: DateTime<Utc>,
    pub error: Option<String>,
    pub cancel_requested: bool,
    pub progress: Option<f64>,
    pub message: Option<String>,
}

impl Store {
    /// Makes one task, durable and announced when this returns.
    pub async fn task_create(&self, ask: CreateAsk) -> Result<Create, StoreError> {
        self.0.create.submit(ask).await
    }

    /// Makes many tasks in one statement: all or none. Ids in the order of the tasks.
    pub async fn task_create_all(&self, tasks: Vec<NewTask>) -> Result<Vec<TaskId>, StoreError> {
        let asks: Vec<_> = tasks.into_iter().map(|task| CreateAsk { task, key: None }).collect();
        let ids: Vec<_> = asks.iter().map(|_| TaskId::generate()).collect();
        let made = insert(self.link(), &asks, &ids).await?;
        debug_assert_eq!(made.len(), ids.len(), "no key, so no conflict");
        Ok(ids)
    }

    /// One task, whole.
    pub async fn task_get(&self, id: TaskId) -> Result<Option<Task>, StoreError> {
        Ok(sqlx::query_file_as!(Task, "src/store/sql/task_get.sql", id.0)
            .fetch_optional(self.link())
            .await?)
    }

    /// The newest `limit` claims of a task, newest first.
    pub async fn task_attempts(&self, id: TaskId, limit: i64) -> Result<Vec<Attempt>, StoreError> {
        Ok(sqlx::query_file_as!(Attempt, "src/store/sql/task_attempts.sql", id.0, limit)
            .fetch_all(self.link())
            .await?)
    }

    /// Where some tasks stand.
    pub async fn task_watch(&self, ids: &[TaskId]) -> Result<Vec<TaskView>, StoreError> {
        let ids: Vec<_> = ids.iter().map(|id| id.0).collect();
        Ok(sqlx::query_file_as!(TaskView, "src/store/sql/task_watch.sql", &ids)
            .fetch_all(self.link())
            .await?)
    }

    /// One page of tasks, newest first.
    pub async fn task_list(&self, filter: &TaskFilter) -> Result<Vec<TaskSummary>, StoreError> {
        Ok(sqlx::query_file_as!(
            TaskSummary,
            "src/store/sql/task_list.sql",
            filter.status.map(Status::as_str),
            filter.codebase_id.as_deref(),
            filter.worker_id.as_deref(),
            filter.created_after,
            filter.created_before,
            filter.after.map(|(created_at, _)| created_at),
            filter.after.map(|(_, id)| id.0),
            filter.limit,
        )
        .fetch_all(&self.link().planned_anew())
        .await?)
    }
}

/// Creates that share a statement.
pub(super) struct CreateBatch {
    pub(super) link: Link,
}

impl Batch for CreateBatch {
    type Op = CreateAsk;
    type Out = Create;

    fn weight_bytes(op: &CreateAsk) -> usize {
        op.task.weight_bytes()
    }

    async fn run(&self, ops: &[CreateAsk]) -> Result<Vec<Result<Create, StoreError>>, StoreError> {
        let ids: Vec<_> = ops.iter().map(|_| TaskId::generate()).collect();
        let mut made: HashMap<TaskId, Task> =
            insert(&self.link, ops, &ids).await?.into_iter().map(|task| (task.id, task)).collect();

        // Every row that is not there had its key taken, by an earlier statement or by a neighbour.
        let keys: Vec<String> = ops
            .iter()
            .zip(&ids)
            .filter(|(_, id)| !made.contains_key(id))
            .filter_map(|(op, _)| op.key.as_ref().map(|(key, _)| key.clone()))
            .collect();
        let first = self.first_of(&keys).await;
        let answer = |(op, id): (&CreateAsk, &TaskId)| {
            if let Some(task) = made.remove(id) {
                return Ok(Create::Created(task));
            }
            let first = first.as_ref().map_err(Clone::clone)?;
            // Gone between the two statements: as good as never used, so a retry will do.
            let (key, hash) = op.key.as_ref().ok_or(StoreError::Busy)?;
            match first.get(key) {
                Some((first_hash, id)) if first_hash == hash => Ok(Create::Repeated(*id)),
                Some(_) => Ok(Create::KeyTaken),
                None => Err(StoreError::Busy),
            }
        };
        Ok(ops.iter().zip(&ids).map(answer).collect())
    }
}

impl CreateBatch {
    /// What some keys made when they were first used: the digest of the body, and the task.
    async fn first_of(
        &self,
        keys: &[String],
    ) -> Result<HashMap<String, (Vec<u8>, TaskId)>, StoreError> {
        if keys.is_empty() {
            return Ok(HashMap::new());
        }
        let rows =
            sqlx::query_file!("src/store/sql/task_by_key.sql", keys).fetch_all(&self.link).await?;
        Ok(rows
            .into_iter()
            .map(|row| (row.idempotency_key, (row.idempotency_hash, row.id)))
            .collect())
    }
}

async fn insert(link: &Link, asks: &[CreateAsk], ids: &[TaskId]) -> Result<Vec<Task>, StoreError> {
    fn column<'a, T>(asks: &'a [CreateAsk], of: impl Fn(&'a NewTask) -> T) -> Vec<T> {
        asks.iter().map(|ask| of(&ask.task)).collect()
    }
    let ids: Vec<_> = ids.iter().map(|id| id.0).collect();
    let titles = column(asks, |task| task.title.as_str());
    let prompts = column(asks, |task| task.prompt.as_deref());
    let codebases = column(asks, NewTask::codebase_id);
    let priorities = column(asks, |task| task.priority);
    // Ids contain no comma, so a list of them travels as one text: arrays of arrays cannot.
    let capabilities = column(asks, |task| task.required_capabilities.join(","));
    let target_workers = column(asks, |task| task.target_worker_id.as_deref());
    let target_agents = column(asks, |task| task.target_agent_name.as_deref());
    let agent_types = column(asks, |task| task.agent_type.as_deref());
    let metadata = column(asks, |task| task.metadata.as_ref());
    let run_ats = column(asks, |task| task.run_at);
    let expires_ats = column(asks, |task| task.expires_at);
    let attempts = column(asks, |task| task.max_attempts.unwrap_or(MAX_ATTEMPTS_DEFAULT));
    let timeouts = column(asks, |task| task.timeout_seconds);
    let keys: Vec<_> =
        asks.iter().map(|ask| ask.key.as_ref().map(|(key, _)| key.as_str())).collect();
    let hashes: Vec<_> =
        asks.iter().map(|ask| ask.key.as_ref().map(|(_, hash)| hash.as_slice())).collect();
    Ok(sqlx::query_file_as!(
        Task,
        "src/store/sql/task_create.sql",
        &ids,
        &titles as &[&str],
        &prompts as &[Option<&str>],
        &codebases as &[&str],
        &priorities,
        &capabilities,
        &target_workers as &[Option<&str>],
        &target_agents as &[Option<&str>],
        &agent_types as &[Option<&str>],
        &metadata as &[Option<&Value>],
        &run_ats as &[Option<DateTime<Utc>>],
        &expires_ats as &[Option<DateTime<Utc>>],
        &attempts,
        &timeouts as &[Option<i32>],
        &keys as &[Option<&str>],
        &hashes as &[Option<&[u8]>],
    )
    .fetch_all(link)
    .await?)
}
