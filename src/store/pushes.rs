//! What the push side reads: hints are turned into truth here.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::json::Lenient;
use super::{Store, StoreError};
use crate::domain::{Asked, Status, Task, TaskId, WorkerId};

/// A claimable task as it is pushed.
#[derive(Clone, Debug)]
pub struct PushTask {
    /// The task; without prompt, metadata, error and checkpoint when it is large.
    pub task: Task,
    /// Whether the large fields were left behind.
    pub is_large: bool,
    /// The transaction that made it claimable: the same again is the same announcement.
    pub ready_xid: i64,
}

/// A task that became claimable, as the sweep sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ready {
    /// The task.
    pub id: TaskId,
    /// The transaction that made it claimable.
    pub xid: i64,
}

/// What has become of announced tasks. Of one that has ended unclaimed, or is not there, nothing is said.
#[derive(Debug, Default)]
pub struct Still {
    /// Those that can still be claimed.
    pub claimable: Vec<Ready>,
    /// Those that were claimed, and by whom the last time.
    pub claimed: Vec<(TaskId, String)>,
}

/// Whom to tell that a task is to be stopped.
#[derive(Debug)]
pub struct Cancellation {
    /// The task.
    pub task_id: TaskId,
    /// Its owner.
    pub worker_id: String,
    /// Which claim of it is meant.
    pub claim_epoch: i64,
    /// Why, if somebody said.
    pub reason: Option<String>,
}

struct PushRow {
    /// Which of the workers that were asked for; nothing where none was.
    n: i64,
    id: TaskId,
    title: String,
    codebase_id: String,
    priority: i32,
    required_capabilities: Vec<String>,
    target_worker_id: Option<String>,
    target_agent_name: Option<String>,
    agent_type: Option<String>,
    prompt: Option<String>,
    metadata: Option<Lenient>,
    error: Option<String>,
    attempt: i32,
    max_attempts: i32,
    timeout_seconds: Option<i32>,
    claim_epoch: i64,
    created_at: DateTime<Utc>,
    run_at: DateTime<Utc>,
    expires_at: Option<DateTime<Utc>>,
    checkpoint: Option<Value>,
    is_large: bool,
    ready_xid: i64,
}

impl From<PushRow> for PushTask {
    fn from(row: PushRow) -> Self {
        let task = Task {
            id: row.id,
            title: row.title,
            status: Status::Pending,
            codebase_id: row.codebase_id,
            priority: row.priority,
            required_capabilities: row.required_capabilities,
            target_worker_id: row.target_worker_id,
            target_agent_name: row.target_agent_name,
            agent_type: row.agent_type,
            prompt: row.prompt,
            metadata: row.metadata.map_or(Value::Null, Value::from),
            attempt: row.attempt,
            max_attempts: row.max_attempts,
            timeout_seconds: row.timeout_seconds,
            claim_epoch: row.claim_epoch,
            claimed_by: None,
            created_at: row.created_at,
            run_at: row.run_at,
            expires_at: row.expires_at,
            claimed_at: None,
            finished_at: None,
            result: None,
            error: row.error,
            cancel_requested_at: None,
            cancel_reason: None,
            progress: None,
            message: None,
            checkpoint: row.checkpoint,
        };
        Self { task, is_large: row.is_large, ready_xid: row.ready_xid }
    }
}

/// Rows by what each was asked for.
fn backlogs(count: usize, rows: Vec<PushRow>) -> Vec<Vec<PushTask>> {
    let mut backlogs: Vec<Vec<PushTask>> = (0..count).map(|_| Vec::new()).collect();
    for row in rows {
        let backlog = usize::try_from(row.n - 1).ok().and_then(|n| backlogs.get_mut(n));
        if let Some(backlog) = backlog {
            backlog.push(row.into());
        }
    }
    backlogs
}

impl Store {
    /// Those of some tasks that can be claimed now, best first.
    pub async fn push_claimable(&self, ids: &[TaskId]) -> Result<Vec<PushTask>, StoreError> {
        let ids: Vec<_> = ids.iter().map(|id| id.0).collect();
        let rows = sqlx::query_file_as!(PushRow, "src/store/sql/push_claimable.sql", &ids)
            .fetch_all(self.link())
            .await?;
        Ok(rows.into_iter().map(PushTask::from).collect())
    }

    /// The best `limit` tasks that each of some workers could claim now, best first. In the order
    /// of the workers; nothing for a worker that is not registered.
    pub async fn push_backlog(
        &self,
        workers: &[WorkerId],
        limit: i64,
    ) -> Result<Vec<Vec<PushTask>>, StoreError> {
        let ids: Vec<_> = workers.iter().map(WorkerId::as_str).collect();
        let rows =
            sqlx::query_file_as!(PushRow, "src/store/sql/push_backlog.sql", &ids as &[&str], limit)
                .fetch_all(self.link())
                .await?;
        Ok(backlogs(workers.len(), rows))
    }

    /// The best `limit` tasks that workers could claim now that are routed in some ways (by codebases and
    /// capabilities), whatever their ids and names, best first. In the order of the ways.
    pub async fn push_backlog_shared(
        &self,
        routings: &[&(Vec<String>, Vec<String>)],
        limit: i64,
    ) -> Result<Vec<Vec<PushTask>>, StoreError> {
        let codebases: Vec<_> = routings.iter().map(|(codebases, _)| codebases.join(",")).collect();
        let capabilities: Vec<_> =
            routings.iter().map(|(_, capabilities)| capabilities.join(",")).collect();
        let rows = sqlx::query_file_as!(
            PushRow,
            "src/store/sql/push_backlog_shared.sql",
            &codebases,
            &capabilities,
            limit
        )
        .fetch_all(self.link())
        .await?;
        Ok(backlogs(routings.len(), rows))
    }

    /// The present snapshot: where a first sweep begins.
    pub async fn push_snapshot(&self) -> Result<String, StoreError> {
        let snapshot = sqlx::query_scalar!(
            r#"
            -- push_snapshot
            select pg_current_snapshot()::text as "snapshot!"
            "#
        )
        .fetch_one(self.link())
        .await?;
        Ok(snapshot)
    }

    /// What became claimable since the snapshot of the last sweep, at most `limit`, and the
    /// snapshot for the next one.
    pub async fn push_ready_since(
        &self,
        snapshot: &str,
        limit: i64,
    ) -> Result<(Vec<Ready>, String), StoreError> {
        let rows = sqlx::query_file!("src/store/sql/push_ready_since.sql", snapshot, limit)
            .fetch_all(self.link())
            .await?;
        let next = rows.first().map_or_else(|| snapshot.to_owned(), |row| row.snapshot.clone());
        let ready = rows
            .into_iter()
            .filter_map(|row| Some(Ready { id: row.id?, xid: row.ready_xid? }))
            .collect();
        Ok((ready, next))
    }

    /// The codebases of what became claimable since a snapshot, at most `limit`.
    pub async fn push_ready_codebases(
        &self,
        snapshot: &str,
        limit: i64,
    ) -> Result<Vec<String>, StoreError> {
        let sql =
            sqlx::query_file_scalar!("src/store/sql/push_ready_codebases.sql", snapshot, limit);
        Ok(sql.fetch_all(self.link()).await?)
    }

    /// Which of some tasks can be claimed now, and by which announcement; and who claimed others.
    pub async fn push_still_claimable(&self, ids: &[TaskId]) -> Result<Still, StoreError> {
        let ids: Vec<_> = ids.iter().map(|id| id.0).collect();
        let rows = sqlx::query_file!("src/store/sql/push_still_claimable.sql", &ids)
            .fetch_all(self.link())
            .await?;
        let mut still = Still::default();
        for row in rows {
            match row.claimed_by {
                Some(owner) => still.claimed.push((row.id, owner)),
                None => still.claimable.push(Ready { id: row.id, xid: row.ready_xid }),
            }
        }
        Ok(still)
    }

    /// What some workers asked for last where they have no stream, and how long ago: a task that they
    /// lost, or whatever was best.
    pub async fn push_asked(
        &self,
        workers: &[WorkerId],
    ) -> Result<HashMap<String, (Asked, Duration)>, StoreError> {
        let workers: Vec<_> = workers.iter().map(WorkerId::as_str).collect();
        let rows = sqlx::query_file!("src/store/sql/push_asked.sql", &workers as &[&str])
            .fetch_all(self.link())
            .await?;
        let ago = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        Ok(rows
            .into_iter()
            .map(|row| {
                let asked = row.task_id.map_or(Asked::Best, Asked::Task);
                (row.worker_id, (asked, ago(row.seconds_ago)))
            })
            .collect())
    }

    /// Whom to tell that some tasks, or tasks that some workers hold, are to be stopped.
    pub async fn push_cancelled(
        &self,
        tasks: &[TaskId],
        workers: &[WorkerId],
    ) -> Result<Vec<Cancellation>, StoreError> {
        let tasks: Vec<_> = tasks.iter().map(|id| id.0).collect();
        let workers: Vec<_> = workers.iter().map(WorkerId::as_str).collect();
        let rows =
            sqlx::query_file!("src/store/sql/push_cancelled.sql", &tasks, &workers as &[&str])
                .fetch_all(self.link())
                .await?;
        Ok(rows
            .into_iter()
            .map(|row| Cancellation {
                task_id: row.id,
                worker_id: row.claimed_by,
                claim_epoch: row.claim_epoch,
                reason: row.cancel_reason,
            })
            .collect())
    }
}
