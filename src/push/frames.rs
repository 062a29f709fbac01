//! The bytes of Server-Sent Events
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).
//!
//! What users wrote only ever stands in JSON, on one line, after `data: `; never in a name, an id or
//! a comment. So no text can end an event or begin another.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::json;

use crate::domain::{ConnectionId, ReplicaId, Task, TaskId, WorkerId};
use crate::store::{Cancellation, Claimed, PushTask, TaskView};

/// Bytes of a pushed frame, at most (protocol S8).
pub const FRAME_BYTES_MAX: usize = 16 * 1024;

/// The range of the hint how long to wait before a reconnect, in ms: streams that broke at once
/// do not come back at once.
pub const RETRY_MS: std::ops::Range<u64> = 500..3_000;

/// Room for the usual event, so that it is written in one go.
const EVENT_BYTES_USUAL: usize = 512;

/// The same for a whole task without its prompt.
const TASK_BYTES_USUAL: usize = 1024;

/// One event. `data` is JSON without line breaks: also without those that only some readers, such
/// as Python's `splitlines`, take for one.
fn event(name: &'static str, data: &impl Serialize) -> String {
    event_of_about(EVENT_BYTES_USUAL, name, data)
}

/// The same, of about so many bytes.
fn event_of_about(bytes: usize, name: &'static str, data: &impl Serialize) -> String {
    let mut frame = Vec::with_capacity(bytes);
    for part in ["event: ", name, "\ndata: "] {
        frame.extend_from_slice(part.as_bytes());
    }
    let begin = frame.len();
    // Unwrap safety: the types below are ours, have string keys and cannot fail to serialize.
    if serde_json::to_writer(&mut frame, data).is_err() {
        frame.truncate(begin);
        frame.extend_from_slice(b"{}");
    }
    // Unwrap safety: JSON is UTF-8.
    let mut frame = String::from_utf8(frame).unwrap_or_default();
    // Most text is ASCII, and to know that is quick.
    if !frame.is_ascii() && frame.contains(['\u{85}', '\u{2028}', '\u{2029}']) {
        frame = frame
            .replace('\u{85}', "\\u0085")
            .replace('\u{2028}', "\\u2028")
            .replace('\u{2029}', "\\u2029");
    }
    frame.push_str("\n\n");
    frame
}

/// The two events of one claimable task, made once and shared by all streams that get them.
#[derive(Clone, Debug)]
pub struct TaskFrames {
    /// `task_available`.
    pub available: Bytes,
    /// `task`, right after it.
    pub task: Bytes,
}

impl TaskFrames {
    /// Encodes a task for its push.
    #[must_use]
    pub fn new(push: &PushTask) -> Self {
        Self { available: available(push).into(), task: whole(push).into() }
    }
}

fn available(push: &PushTask) -> String {
    #[derive(Serialize)]
    struct Available<'a> {
        task_id: TaskId,
        title: &'a str,
        codebase_id: &'a str,
        priority: i32,
        #[serde(skip_serializing_if = "Option::is_none")]
        required_capabilities: Option<&'a [String]>,
        created_at: DateTime<Utc>,
        #[serde(skip_serializing_if = "Option::is_none")]
        partial: Option<bool>,
    }
    let task = &push.task;
    let mut data = Available {
        task_id: task.id,
        title: &task.title,
        codebase_id: &task.codebase_id,
        priority: task.priority,
        required_capabilities: Some(&task.required_capabilities),
        created_at: task.created_at,
        partial: None,
    };
    let frame = event("task_available", &data);
    if frame.len() <= FRAME_BYTES_MAX {
        return frame;
    }
    (data.required_capabilities, data.partial) = (None, Some(true));
    event("task_available", &data)
}

fn whole(push: &PushTask) -> String {
    if !push.is_large {
        let prompt_bytes = push.task.prompt.as_ref().map_or(0, String::len);
        let frame = event_of_about(TASK_BYTES_USUAL + prompt_bytes, "task", &push.task);
        if frame.len() <= FRAME_BYTES_MAX {
            return frame;
        }
    }
    let mut data = json!(push.task);
    leave_out(&mut data, &["prompt", "metadata", "error", "checkpoint"]);
    let frame = event("task", &data);
    if frame.len() <= FRAME_BYTES_MAX {
        return frame;
    }
    leave_out(&mut data, &["required_capabilities"]);
    event("task", &data)
}

/// The event of a task that was claimed for its worker: what the answer to a claim says, as far as that
/// fits into a frame. `is_again`: its worker may know of it.
#[must_use]
pub fn assigned(claimed: &Claimed, is_again: bool, is_partial: bool) -> Bytes {
    #[derive(Serialize)]
    struct Assigned<'a> {
        #[serde(flatten)]
        task: &'a Task,
        /// Seconds.
        lease_expires_in: u64,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        redelivered: bool,
    }
    let Claimed { task, lease } = claimed;
    let data = Assigned { task, lease_expires_in: lease.as_secs(), redelivered: is_again };
    if !is_partial && task.prompt.as_ref().is_none_or(|prompt| prompt.len() < FRAME_BYTES_MAX) {
        let frame = event("task", &data);
        if frame.len() <= FRAME_BYTES_MAX {
            return frame.into();
        }
    }
    let mut data = json!(data);
    leave_out(&mut data, &["prompt", "metadata", "error", "checkpoint"]);
    let frame = event("task", &data);
    if frame.len() <= FRAME_BYTES_MAX {
        return frame.into();
    }
    leave_out(&mut data, &["required_capabilities"]);
    event("task", &data).into()
}

fn leave_out(data: &mut serde_json::Value, fields: &[&str]) {
    if let Some(object) = data.as_object_mut() {
        for field in fields {
            object.remove(*field);
        }
        object.insert("partial".to_owned(), true.into());
    }
}

/// The first event of a stream, with the hint how long to wait before a reconnect.
#[must_use]
pub fn connected(
    worker_id: &WorkerId,
    connection_id: ConnectionId,
    replica_id: ReplicaId,
    keepalive_seconds: u64,
    slots: Option<usize>,
    retry_ms: u64,
) -> Bytes {
    #[derive(Serialize)]
    struct Connected<'a> {
        message: &'static str,
        worker_id: &'a WorkerId,
        connection_id: ConnectionId,
        replica_id: ReplicaId,
        keepalive_seconds: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        slots: Option<usize>,
    }
    let data = Connected {
        message: "SSE connection established",
        worker_id,
        connection_id,
        replica_id,
        keepalive_seconds,
        slots,
    };
    format!("retry: {retry_ms}\n{}", event("connected", &data)).into()
}

/// Nothing happened, and the connection lives.
#[must_use]
pub fn keepalive() -> Bytes {
    Bytes::from_static(b"event: keepalive\ndata: {}\n\n")
}

/// The owner of a running task is to stop.
#[must_use]
pub fn cancelled(cancellation: &Cancellation) -> Bytes {
    #[derive(Serialize)]
    struct Cancelled<'a> {
        task_id: TaskId,
        claim_epoch: i64,
        reason: Option<&'a str>,
    }
    let data = Cancelled {
        task_id: cancellation.task_id,
        claim_epoch: cancellation.claim_epoch,
        reason: cancellation.reason.as_deref(),
    };
    event("task_cancelled", &data).into()
}

/// The id of the last event of a task that is followed.
pub const ENDED_ID: &str = "ended";

/// Whether only what a heartbeat says has changed.
#[must_use]
pub fn is_progress(before: &TaskView, now: &TaskView) -> bool {
    let mut same = before.clone();
    same.progress = now.progress;
    same.message.clone_from(&now.message);
    same == *now
}

/// The hint how long to wait before a reconnect.
#[must_use]
pub fn retry(ms: u64) -> Bytes {
    format!("retry: {ms}\n\n").into()
}

/// Where a task that is followed stands.
#[must_use]
pub fn state(view: &TaskView) -> Bytes {
    event("state", view).into()
}

/// What a heartbeat said of a task that is followed.
#[must_use]
pub fn progress(view: &TaskView) -> Bytes {
    let TaskView { id, attempt, progress, message, .. } = view;
    let data =
        json!({ "task_id": id, "attempt": attempt, "progress": progress, "message": message });
    event("progress", &data).into()
}

/// How a task that was followed has ended, and the last event of it.
#[must_use]
pub fn ended(task: &Task) -> Bytes {
    let mut data = json!({
        "task_id": task.id,
        "status": task.status,
        "attempt": task.attempt,
        "max_attempts": task.max_attempts,
        "claim_epoch": task.claim_epoch,
        "claimed_by": task.claimed_by,
        "finished_at": task.finished_at,
        "error": task.error,
        "cancel_reason": task.cancel_reason,
        "result": task.result,
    });
    let mut frame = event("ended", &data);
    if frame.len() > FRAME_BYTES_MAX {
        leave_out(&mut data, &["result", "error"]);
        frame = event("ended", &data);
    }
    format!("id: {ENDED_ID}\n{frame}").into()
}

/// Why the server ends a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A newer stream of the same worker, on whatever replica.
    Superseded,
    /// The worker said farewell.
    Unregistered,
    /// The replica shuts down.
    Draining,
    /// Its peer takes nothing any more.
    TooSlow,
    /// It has been open for long: streams spread over the replicas again.
    MaxAge,
    /// The task that was followed was deleted.
    TaskDeleted,
}

impl End {
    /// The `code` of the `error` event.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Superseded => "superseded",
            Self::Unregistered => "unregistered",
            Self::Draining => "draining",
            Self::TooSlow => "too_slow",
            Self::MaxAge => "max_age",
            Self::TaskDeleted => "task_not_found",
        }
    }

    /// The `error` event before the end; who may come back is told when, and each another time.
    #[must_use]
    pub fn frame(self) -> Bytes {
        #[derive(Serialize)]
        struct Ended {
            message: &'static str,
            code: &'static str,
            reconnect: bool,
        }
        let (message, reconnect) = match self {
            Self::Superseded => ("a newer stream of this worker_id has taken over", false),
            Self::Unregistered => ("this worker was unregistered", false),
            Self::Draining => ("this replica is shutting down; connect again", true),
            Self::TooSlow => ("nothing was read for too long; connect again", true),
            Self::MaxAge => ("this stream has reached its age; connect again", true),
            Self::TaskDeleted => ("the task was deleted", false),
        };
        let frame = event("error", &Ended { message, code: self.code(), reconnect });
        if reconnect {
            return format!("retry: {}\n{frame}", rand::random_range(RETRY_MS)).into();
        }
        frame.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_can_end_an_event_or_begin_another() {
        let hostile =
            "x\n\nevent: task\r\ndata: {}\r\u{2028}\u{2029}\u{85}\u{b}\u{c}\u{1c}\u{feff}\0";
        let frame = event("task_available", &json!({ "title": hostile }));
        let lines: Vec<_> =
            frame.split(['\n', '\r', '\u{2028}', '\u{2029}', '\u{85}', '\u{b}', '\u{c}']).collect();
        assert_eq!(lines.len(), 4, "{frame:?}");
        let data: serde_json::Value =
            serde_json::from_str(lines[1].strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(data["title"], hostile);
    }
}
