//! The one place where an error becomes a response (RFC 9457, `application/problem+json`).

use axum::Json;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::request_body::BODY_SILENCE_MAX;
use crate::domain::limits::Invalid;
use crate::domain::{Status, TaskId};
use crate::store::{Lost, StoreError, chain};

/// Everything that a request can fail with. Handlers use `?`; nothing else knows a status code.
#[derive(Debug)]
pub(super) enum Problem {
    MalformedJson(String),
    InvalidBody(String),
    Invalid(Invalid),
    BadParameter(Invalid),
    BadQuery(String),
    NotJson,
    BodyUnreadable,
    TooLarge { bytes_max: usize },
    TooSlow { seconds: u64 },
    BodyStalled,
    WorkerIdMissing,
    WorkerIdConflict,
    RouteNotFound { method: String, path: String },
    MethodNotAllowed { method: String, path: String },
    TaskNotFound(String),
    WorkerNotFound(String),
    NotRouted(TaskId),
    UnknownWorker(String),
    AlreadyClaimed { task_id: TaskId, by: Option<String> },
    TaskEnded { task_id: TaskId, status: Status },
    TaskNotDue(TaskId),
    TaskExpired(TaskId),
    ClaimLost { task_id: TaskId, lost: Lost },
    ClaimIdSpent,
    IdempotencyKeyTaken,
    Superseded,
    InvalidBatch { errors: Vec<(usize, String)>, count: usize },
    StreamsDisabled,
    Draining,
    TooManyStreams,
    NotReady(String),
    Store(StoreError),
}

/// A problem in the words of the wire.
struct Described {
    status: StatusCode,
    /// Stable: clients switch on this, never on the texts.
    code: &'static str,
    title: &'static str,
    /// What happened here, and what to do.
    detail: String,
    /// Further members.
    more: Map<String, Value>,
}

#[derive(Serialize)]
pub(super) struct Wire {
    r#type: String,
    title: &'static str,
    #[serde(serialize_with = "as_number")]
    status: StatusCode,
    code: &'static str,
    detail: String,
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// Seconds after which a client may try again what failed in passing.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn as_number<S: Serializer>(status: &StatusCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}

impl Problem {
    /// As it is sent, alone or in an answer about many things.
    pub(super) fn wire(&self) -> Wire {
        let Described { status, code, title, detail, more } = self.describe();
        let r#type = format!("urn:taskwire:problem:{code}");
        Wire { r#type, title, status, code, detail, more }
    }

    /// Exhaustive on purpose: a new variant does not compile until it is described.
    #[expect(clippy::too_many_lines, reason = "a table, a row a problem")]
    fn describe(&self) -> Described {
        use StatusCode as S;
        let of = |status, code, title, detail: String| Described {
            status,
            code,
            title,
            detail,
            more: Map::new(),
        };
        match self {
            Self::MalformedJson(what) => of(
                S::BAD_REQUEST,
                "malformed_json",
                "The body is not valid JSON",
                what.clone(),
            ),
            Self::InvalidBody(what) => of(
                S::UNPROCESSABLE_ENTITY,
                "invalid_body",
                "The body does not have the expected form",
                what.clone(),
            ),
            Self::Invalid(invalid) => of(
                S::UNPROCESSABLE_ENTITY,
                "invalid_field",
                "A field has a value that cannot be accepted",
                invalid.to_string(),
            )
            .with("field", invalid.field),
            Self::BadParameter(invalid) => of(
                S::BAD_REQUEST,
                "invalid_parameter",
                "A header or query parameter cannot be accepted",
                invalid.to_string(),
            )
            .with("field", invalid.field),
            Self::BadQuery(what) => of(
                S::BAD_REQUEST,
                "invalid_query",
                "The query cannot be read",
                what.clone(),
            ),
            Self::NotJson => of(
                S::UNSUPPORTED_MEDIA_TYPE,
                "not_json",
                "The body must be JSON",
                "send the header `Content-Type: application/json` (curl: -H 'Content-Type: application/json')"
                    .to_owned(),
            ),
            Self::BodyUnreadable => of(
                S::BAD_REQUEST,
                "body_unreadable",
                "The body ended too early",
                "the connection broke before the whole body had arrived; nothing was done".to_owned(),
            ),
            Self::TooLarge { bytes_max } => of(
                S::PAYLOAD_TOO_LARGE,
                "too_large",
                "The body is too large",
                format!("this route takes at most {bytes_max} bytes; nothing was done"),
            )
            .with("bytes_max", *bytes_max),
            Self::TooSlow { seconds } => of(
                S::REQUEST_TIMEOUT,
                "too_slow",
                "The request took too long",
                format!("a request has {seconds} s to arrive and be answered; try again"),
            ),
            Self::BodyStalled => of(
                S::REQUEST_TIMEOUT,
                "too_slow",
                "The request took too long",
                format!(
                    "nothing of its body came for {} s; try again",
                    BODY_SILENCE_MAX.as_secs()
                ),
            ),
            Self::WorkerIdMissing => of(
                S::BAD_REQUEST,
                "worker_id_missing",
                "Who is calling?",
                "name the worker by ?worker_id=…, by the header X-Worker-ID, or by worker_id in the body; \
                 (proxies such as nginx drop headers with an underscore)"
                    .to_owned(),
            ),
            Self::WorkerIdConflict => of(
                S::BAD_REQUEST,
                "worker_id_conflict",
                "Two different worker ids",
                "query, headers and body name different workers; send one worker_id".to_owned(),
            ),
            Self::RouteNotFound { method, path } => of(
                S::NOT_FOUND,
                "route_not_found",
                "There is no such route",
                format!("{method} {path} is nothing that Taskwire serves; the README lists every route"),
            ),
            Self::MethodNotAllowed { method, path } => of(
                S::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "This route has other methods",
                format!("{path} does not take {method}; the header Allow says what it takes"),
            ),
            Self::TaskNotFound(id) => of(
                S::NOT_FOUND,
                "task_not_found",
                "There is no such task",
                format!("no task has the id {id} (any more)"),
            ),
            Self::WorkerNotFound(id) => of(
                S::NOT_FOUND,
                "worker_not_found",
                "There is no such worker",
                format!("no worker {id} is registered; register it, or let it open its stream"),
            ),
            Self::NotRouted(id) => of(
                S::FORBIDDEN,
                "not_routed",
                "The task is not for this worker",
                format!(
                    "task {id} asks for a codebase, capabilities or a target that this worker does not have"
                ),
            ),
            Self::UnknownWorker(id) => of(
                S::FORBIDDEN,
                "unknown_worker",
                "Nobody knows this worker",
                format!(
                    "worker {id} is neither registered nor connected: \
                     POST /v1/agent/workers/register, or open its stream"
                ),
            ),
            Self::AlreadyClaimed { task_id, by } => of(
                S::CONFLICT,
                "already_claimed",
                "Another claim was faster",
                match by {
                    Some(by) => format!("task {task_id} is claimed by {by}; go on with the next one"),
                    None => format!("task {task_id} is being claimed or changed this moment; go on with the next one"),
                },
            )
            .with("claimed_by", by.clone()),
            Self::TaskEnded { task_id, status } => of(
                S::CONFLICT,
                "task_ended",
                "The task has ended",
                format!("task {task_id} is {}", status.as_str()),
            )
            .with("task_status", status.as_str()),
            Self::TaskNotDue(id) => of(
                S::CONFLICT,
                "task_not_due",
                "The task is not due yet",
                format!("the run_at of task {id} lies in the future; it is announced when it is due"),
            ),
            Self::TaskExpired(id) => of(
                S::CONFLICT,
                "task_expired",
                "The task has expired",
                format!("the expires_at of task {id} is over; it can no longer be claimed"),
            ),
            Self::ClaimLost { task_id, lost } => {
                of(S::CONFLICT, "claim_lost", "This claim is over", lost_because(*task_id, lost))
                    .with("task_status", lost.status.as_str())
                    .with("claimed_by", lost.claimed_by.clone())
                    .with("claim_epoch", lost.claim_epoch)
                    .with("outcome", lost.outcome.clone())
            }
            Self::ClaimIdSpent => of(
                S::CONFLICT,
                "claim_id_spent",
                "This claim_id was used",
                "what was claimed with it has ended; use a new claim_id for each call that is no repetition".to_owned(),
            ),
            Self::IdempotencyKeyTaken => of(
                S::CONFLICT,
                "idempotency_key_taken",
                "This Idempotency-Key made another task",
                "the key was used with a different body; use a new key for a new task".to_owned(),
            ),
            Self::Superseded => of(
                S::CONFLICT,
                "superseded",
                "Another stream of this worker was newer",
                "two streams of the same worker_id opened in one moment; give each process its own".to_owned(),
            ),
            Self::InvalidBatch { errors, count } => of(
                S::UNPROCESSABLE_ENTITY,
                "invalid_batch",
                "Some tasks of the batch cannot be accepted",
                format!("{count} of the tasks are not valid; none was created"),
            )
            .with(
                "errors",
                errors
                    .iter()
                    .map(|(index, detail)| json!({ "index": index, "detail": detail }))
                    .collect::<Vec<_>>(),
            ),
            Self::StreamsDisabled => of(
                S::SERVICE_UNAVAILABLE,
                "sse_disabled",
                "Streams are switched off",
                "this server runs with WORKER_SSE_ENABLED=false".to_owned(),
            ),
            Self::TooManyStreams => of(
                S::SERVICE_UNAVAILABLE,
                "too_many_streams",
                "Too many streams",
                "this replica has no room for more; connect again: another one may".to_owned(),
            ),
            Self::Draining => of(
                S::SERVICE_UNAVAILABLE,
                "draining",
                "This replica is shutting down",
                "connect again: another replica will answer".to_owned(),
            ),
            Self::NotReady(why) => {
                of(S::SERVICE_UNAVAILABLE, "not_ready", "This replica is not ready", why.clone())
            }
            Self::Store(StoreError::Unavailable(_)) => of(
                S::SERVICE_UNAVAILABLE,
                "postgres_unavailable",
                "Postgres is not available",
                "try again in a moment; what was acknowledged before is safe".to_owned(),
            ),
            Self::Store(StoreError::Contended(_)) => of(
                S::SERVICE_UNAVAILABLE,
                "contended",
                "Somebody holds a lock",
                "a row that this needs stayed locked for too long, as by an open transaction; try again"
                    .to_owned(),
            ),
            Self::Store(StoreError::Busy) => of(
                S::SERVICE_UNAVAILABLE,
                "busy",
                "Too much is waiting",
                "more requests wait for Postgres than may; try again in a moment".to_owned(),
            ),
            Self::Store(StoreError::Refused { constraint, message }) => of(
                S::UNPROCESSABLE_ENTITY,
                "refused",
                "Postgres refused the values",
                message.clone(),
            )
            .with("constraint", constraint.clone()),
            // The cause is for the log. The client learns only that it was us.
            Self::Store(StoreError::Fault(_)) => of(
                S::INTERNAL_SERVER_ERROR,
                "internal",
                "A fault of the server",
                "the server's log says more".to_owned(),
            ),
        }
    }
}

/// What happened to a claim, and what its worker is to do.
fn lost_because(task_id: TaskId, lost: &Lost) -> String {
    let ended = match lost.outcome.as_deref() {
        Some("lapsed") => "it lapsed, as no sign of life came within its lease",
        Some("timed_out") => "it took longer than the task's timeout_seconds",
        Some("requeued") => "the task was requeued by hand",
        Some("cancelled") => "the task was cancelled",
        Some("completed") => "it had ended as completed",
        Some("failed") => "it had ended as failed",
        Some("released") => "it had been released",
        _ => "this worker has no such claim",
    };
    let stands = match (lost.status, &lost.claimed_by) {
        (Status::Pending, _) => "is pending: drop the work, or claim it anew".to_owned(),
        (Status::Running, Some(by)) => {
            format!("belongs to worker {by} at claim epoch {}: drop the work", lost.claim_epoch)
        }
        (ended, _) => format!("is {}: drop the work", ended.as_str()),
    };
    format!("{ended}; task {task_id} {stands}")
}

impl Described {
    fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.more.insert(name.to_owned(), value.into());
        self
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        if let Self::Store(error @ StoreError::Fault(_)) = &self {
            tracing::error!("a request failed: {}", chain(error));
        }
        let wire = self.wire();
        let status = wire.status;
        let mut response = (status, Json(wire)).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
        }
        response
    }
}
