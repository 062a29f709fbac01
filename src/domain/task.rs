//! A task: what it is in the tables, and what a producer may ask for.

use chrono::{DateTime, Datelike, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ids::TaskId;
use super::limits::{self, Invalid};
use super::routing::{GLOBAL, TaskRouting};

/// Where a task is in its life: `pending` → `running` → one of the last three.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum Status {
    /// Waits for a worker, or for its `run_at`.
    Pending,
    /// Claimed by a worker.
    Running,
    /// Done.
    Completed,
    /// Given up: attempts used up, or the worker said that the failure is final.
    Failed,
    /// Called off.
    Cancelled,
}

impl Status {
    /// The word on the wire and in the table.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether it is the end of a task's life.
    #[must_use]
    pub fn is_end(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// Reads the word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Pending, Self::Running, Self::Completed, Self::Failed, Self::Cancelled]
            .into_iter()
            .find(|status| status.as_str() == word)
    }
}

/// One task as everybody sees it. The columns' comments in the schema say what each field means.
#[derive(Clone, Debug, Serialize)]
#[expect(
    missing_docs,
    reason = "`\\d+ tasks` and `\\d+ heartbeats` document each column of this name"
)]
pub struct Task {
    pub id: TaskId,
    pub title: String,
    pub status: Status,
    pub codebase_id: String,
    pub priority: i32,
    pub required_capabilities: Vec<String>,
    pub target_worker_id: Option<String>,
    pub target_agent_name: Option<String>,
    pub agent_type: Option<String>,
    pub prompt: Option<String>,
    pub metadata: Value,
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
    pub result: Option<Value>,
    pub error: Option<String>,
    pub cancel_requested_at: Option<DateTime<Utc>>,
    pub cancel_reason: Option<String>,
    pub progress: Option<f64>,
    pub message: Option<String>,
    pub checkpoint: Option<Value>,
}

impl Task {
    /// What routing asks of it.
    #[must_use]
    pub fn routing(&self) -> TaskRouting<'_> {
        TaskRouting {
            codebase_id: &self.codebase_id,
            required_capabilities: &self.required_capabilities,
            target_worker_id: self.target_worker_id.as_deref(),
            target_agent_name: self.target_agent_name.as_deref(),
        }
    }
}

/// A task that a producer asks for. [`NewTask::check`] comes before it goes anywhere.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "`\\d+ tasks` documents each column of this name")]
pub struct NewTask {
    pub title: String,
    #[serde(default)]
    pub prompt: Option<String>,
    #[serde(default)]
    pub codebase_id: Option<String>,
    #[serde(default)]
    pub priority: i32,
    #[serde(default)]
    pub required_capabilities: Vec<String>,
    #[serde(default)]
    pub target_worker_id: Option<String>,
    #[serde(default)]
    pub target_agent_name: Option<String>,
    #[serde(default)]
    pub agent_type: Option<String>,
    #[serde(default)]
    pub metadata: Option<Value>,
    #[serde(default)]
    pub run_at: Option<DateTime<Utc>>,
    #[serde(default)]
    pub expires_at: Option<DateTime<Utc>>,
    #[serde(default)]
    pub max_attempts: Option<i32>,
    #[serde(default)]
    pub timeout_seconds: Option<i32>,
}

/// Attempts of a task that names no number.
pub const MAX_ATTEMPTS_DEFAULT: i32 = 3;

impl NewTask {
    /// Checks every value against its limit, and puts the lists into their stored form.
    pub fn check(mut self) -> Result<Self, Invalid> {
        let chars = self.title.chars().count();
        if !(1..=limits::TITLE_CHARS_MAX).contains(&chars) {
            let detail = format!("must have 1 to {} characters", limits::TITLE_CHARS_MAX);
            return Err(Invalid::new("title", detail));
        }
        limits::check_no_nul("title", &self.title)?;
        if let Some(prompt) = &self.prompt {
            limits::check_text("prompt", prompt, limits::PROMPT_BYTES_MAX)?;
        }
        for (field, id) in [
            ("codebase_id", &self.codebase_id),
            ("target_worker_id", &self.target_worker_id),
            ("agent_type", &self.agent_type),
        ] {
            if let Some(id) = id {
                limits::check_id(field, id)?;
            }
        }
        if let Some(name) = &self.target_agent_name {
            limits::check_name("target_agent_name", name)?;
        }
        self.required_capabilities = limits::check_ids(
            "required_capabilities",
            self.required_capabilities,
            limits::CAPABILITIES_MAX,
        )?;
        if let Some(metadata) = &self.metadata {
            if !metadata.is_object() {
                return Err(Invalid::new("metadata", "must be a JSON object"));
            }
            limits::check_json("metadata", metadata)?;
        }
        check_time("run_at", self.run_at)?;
        check_time("expires_at", self.expires_at)?;
        if let (Some(run_at), Some(expires_at)) = (self.run_at, self.expires_at)
            && expires_at <= run_at
        {
            return Err(Invalid::new("expires_at", "must be later than `run_at`"));
        }
        check_range("max_attempts", self.max_attempts, limits::ATTEMPTS_MAX)?;
        check_range("timeout_seconds", self.timeout_seconds, limits::TIMEOUT_SECONDS_MAX)?;
        Ok(self)
    }

    /// Its codebase: `global` unless it names one.
    #[must_use]
    pub fn codebase_id(&self) -> &str {
        self.codebase_id.as_deref().unwrap_or(GLOBAL)
    }

    /// About how many bytes it takes on its way to Postgres.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let metadata = self.metadata.as_ref().map_or(0, |value| value.to_string().len());
        256 + self.title.len() + self.prompt.as_ref().map_or(0, String::len) + metadata
    }
}

fn check_time(field: &'static str, time: Option<DateTime<Utc>>) -> Result<(), Invalid> {
    match time {
        Some(time) if !(1970..=9999).contains(&time.year()) => {
            Err(Invalid::new(field, "must lie in the years 1970 to 9999"))
        }
        _ => Ok(()),
    }
}

fn check_range(field: &'static str, value: Option<i32>, max: i32) -> Result<(), Invalid> {
    match value {
        Some(value) if !(1..=max).contains(&value) => {
            Err(Invalid::new(field, format!("must be 1 to {max}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str) -> Result<NewTask, Invalid> {
        serde_json::from_str::<NewTask>(body).unwrap().check()
    }

    #[test]
    fn a_title_is_enough() {
        let task = check(r#"{"title":"x"}"#).unwrap();
        assert_eq!(task.codebase_id(), "global");
        assert_eq!(task.priority, 0);
    }

    #[test]
    fn each_bad_value_is_named() {
        for (body, field) in [
            (r#"{"title":""}"#.to_owned(), "title"),
            (format!(r#"{{"title":"{}"}}"#, "x".repeat(501)), "title"),
            (r#"{"title":"\u0000"}"#.to_owned(), "title"),
            (r#"{"title":"x","codebase_id":"a b"}"#.to_owned(), "codebase_id"),
            (r#"{"title":"x","codebase_id":""}"#.to_owned(), "codebase_id"),
            (r#"{"title":"x","required_capabilities":["a,b"]}"#.to_owned(), "required_capabilities"),
            (r#"{"title":"x","metadata":[]}"#.to_owned(), "metadata"),
            (r#"{"title":"x","max_attempts":0}"#.to_owned(), "max_attempts"),
            (r#"{"title":"x","timeout_seconds":-1}"#.to_owned(), "timeout_seconds"),
            (
                r#"{"title":"x","run_at":"2030-01-01T00:00:00Z","expires_at":"2029-01-01T00:00:00Z"}"#
                    .to_owned(),
                "expires_at",
            ),
        ] {
            assert_eq!(check(&body).unwrap_err().field, field, "{body}");
        }
    }
}
