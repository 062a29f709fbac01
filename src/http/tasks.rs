//! Tasks: create, batch, get, attempts, list, cancel.

use axum::Json;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::LOCATION;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::App;
use super::extract::{
    MaybeJsonBody, Params, TaskInPath, header, is_object, parse, parse_object, parse_task_id,
    read_json, read_large_json,
};
use super::problem::Problem;
use crate::domain::limits::{
    self, BATCH_BODY_BYTES_MAX, BATCH_TASKS_MAX, BODY_BYTES_MAX, Invalid, PAGE_TASKS_MAX,
};
use crate::domain::{NewTask, Status, Task, TaskId};
use crate::store::{Cancelled, Create, CreateAsk, StoreError, TaskFilter};

/// Tasks on a page that asks for no number.
const PAGE_TASKS_DEFAULT: i64 = 100;
/// Claims of one task that are listed: as many as are kept, and the running one.
const ATTEMPTS_SHOWN_MAX: i64 = 1001;
/// Bad tasks of a batch that are named; the rest is counted.
const BATCH_ERRORS_MAX: usize = 100;

pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/v1/tasks", post(create).get(list))
        .route("/v1/tasks/batch", post(create_batch))
        .route("/v1/tasks/{id}", get(read_one))
        .route("/v1/tasks/{id}/attempts", get(attempts))
        .route("/v1/tasks/{id}/cancel", post(cancel))
}

async fn create(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    let key = idempotency_key(request.headers())?.map(str::to_owned);
    let body = read_json(request, BODY_BYTES_MAX).await?;
    let task = parse_object::<NewTask>(&body)?.check().map_err(Problem::Invalid)?;
    let key = match key {
        Some(key) => Some((key, digest(&body)?)),
        None => None,
    };
    match app.store.task_create(CreateAsk { task, key }).await? {
        Create::Created(task) => {
            app.metrics.tasks_created.inc();
            let location = format!("/v1/tasks/{}", task.id);
            Ok((StatusCode::CREATED, [(LOCATION, location)], Json(task)).into_response())
        }
        Create::Repeated(id) => {
            let task = find(&app, id).await?;
            Ok((StatusCode::OK, [(LOCATION, format!("/v1/tasks/{id}"))], Json(task))
                .into_response())
        }
        Create::KeyTaken => Err(Problem::IdempotencyKeyTaken),
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
    let Some(key) = header(headers, "idempotency-key")? else {
        return Ok(None);
    };
    if key.is_empty() || key.len() > limits::IDEMPOTENCY_KEY_BYTES_MAX {
        let detail = format!("must have 1 to {} bytes", limits::IDEMPOTENCY_KEY_BYTES_MAX);
        return Err(Problem::BadParameter(Invalid::new("Idempotency-Key", detail)));
    }
    Ok(Some(key))
}

/// The digest of what a body says: the order of its fields and its white space do not count.
fn digest(body: &[u8]) -> Result<Vec<u8>, Problem> {
    let mut canonical = parse::<Value>(body)?;
    canonical.sort_all_objects();
    Ok(Sha256::digest(canonical.to_string()).to_vec())
}

/// A batch that is no bare list.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Batch<'a> {
    #[serde(borrow)]
    tasks: Vec<&'a RawValue>,
}

async fn create_batch(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    if idempotency_key(request.headers())?.is_some() {
        return Err(Problem::BadParameter(Invalid::new(
            "Idempotency-Key",
            "is for single tasks; POST /v1/tasks takes it",
        )));
    }
    let (body, _room) = read_large_json(request, BATCH_BODY_BYTES_MAX, &app.batch_kib).await?;
    let _slot = app.batches.acquire().await.map_err(|_| Problem::Store(StoreError::Busy))?;
    let tasks = check_batch(&body)?;
    let ids = app.store.task_create_all(tasks).await?;
    app.metrics.tasks_created.inc_by(ids.len() as u64);
    Ok((StatusCode::CREATED, Json(json!({ "count": ids.len(), "ids": ids }))).into_response())
}

fn check_batch(body: &[u8]) -> Result<Vec<NewTask>, Problem> {
    let raw =
        if is_object(body) { parse::<Batch>(body)?.tasks } else { parse::<Vec<&RawValue>>(body)? };
    if !(1..=BATCH_TASKS_MAX).contains(&raw.len()) {
        let detail = format!("must be 1 to {BATCH_TASKS_MAX}, not {}", raw.len());
        return Err(Problem::Invalid(Invalid::new("tasks", detail)));
    }
    let mut tasks = Vec::with_capacity(raw.len());
    let (mut errors, mut count) = (Vec::new(), 0);
    for (index, raw) in raw.into_iter().enumerate() {
        match check_one(raw) {
            Ok(task) => tasks.push(task),
            Err(detail) => {
                count += 1;
                if errors.len() < BATCH_ERRORS_MAX {
                    errors.push((index, detail));
                }
            }
        }
    }
    if count > 0 { Err(Problem::InvalidBatch { errors, count }) } else { Ok(tasks) }
}

fn check_one(raw: &RawValue) -> Result<NewTask, String> {
    if !is_object(raw.get().as_bytes()) {
        return Err("expected a JSON object".to_owned());
    }
    let task: NewTask = serde_json::from_str(raw.get()).map_err(|error| error.to_string())?;
    task.check().map_err(|invalid| invalid.to_string())
}

async fn read_one(
    State(app): State<App>,
    TaskInPath(id): TaskInPath,
) -> Result<Json<Task>, Problem> {
    find(&app, id).await.map(Json)
}

async fn find(app: &App, id: TaskId) -> Result<Task, Problem> {
    app.store.task_get(id).await?.ok_or_else(|| Problem::TaskNotFound(id.to_string()))
}

/// How a task came to where it is: its claims, newest first.
async fn attempts(
    State(app): State<App>,
    TaskInPath(id): TaskInPath,
) -> Result<Json<Value>, Problem> {
    let attempts = app.store.task_attempts(id, ATTEMPTS_SHOWN_MAX).await?;
    if attempts.is_empty() {
        find(&app, id).await?;
    }
    Ok(Json(json!({ "task_id": id, "attempts": attempts })))
}

async fn list(State(app): State<App>, params: Params) -> Result<Json<Value>, Problem> {
    params.only(&[
        "status",
        "codebase_id",
        "worker_id",
        "created_after",
        "created_before",
        "cursor",
        "limit",
    ])?;
    let filter = TaskFilter {
        status: params.get("status")?.map(parse_status).transpose()?,
        codebase_id: params
            .get("codebase_id")?
            .map(|id| parse_id("codebase_id", id))
            .transpose()?,
        worker_id: params.get("worker_id")?.map(|id| parse_id("worker_id", id)).transpose()?,
        created_after: parse_time("created_after", params.get("created_after")?)?,
        created_before: parse_time("created_before", params.get("created_before")?)?,
        after: params.get("cursor")?.map(parse_cursor).transpose()?,
        limit: parse_limit(params.get("limit")?)?,
    };
    let _slot = app.listings.acquire().await.map_err(|_| Problem::Store(StoreError::Busy))?;
    let tasks = app.store.task_list(&filter).await?;
    let is_full = i64::try_from(tasks.len()).is_ok_and(|count| count == filter.limit);
    let next_cursor = tasks
        .last()
        .filter(|_| is_full)
        .map(|task| format!("{}_{}", task.created_at.timestamp_micros(), task.id));
    Ok(Json(json!({ "tasks": tasks, "next_cursor": next_cursor })))
}

fn bad(name: &'static str, detail: impl Into<String>) -> Problem {
    Problem::BadParameter(Invalid::new(name, detail))
}

fn parse_status(text: &str) -> Result<Status, Problem> {
    Status::parse(text).ok_or_else(|| {
        bad("status", "must be one of pending, running, completed, failed, cancelled")
    })
}

fn parse_id(name: &'static str, text: &str) -> Result<String, Problem> {
    limits::check_id(name, text).map_err(Problem::BadParameter)?;
    Ok(text.to_owned())
}

fn parse_time(name: &'static str, text: Option<&str>) -> Result<Option<DateTime<Utc>>, Problem> {
    let Some(text) = text else { return Ok(None) };
    // A `+` that was not percent-encoded arrives as a blank.
    DateTime::parse_from_rfc3339(&text.replace(' ', "+"))
        .map(|time| Some(time.to_utc()))
        .map_err(|_| bad(name, "must be a time like 2030-01-31T12:00:00Z"))
}

fn parse_limit(text: Option<&str>) -> Result<i64, Problem> {
    let Some(text) = text else {
        return Ok(PAGE_TASKS_DEFAULT);
    };
    text.parse()
        .ok()
        .filter(|limit| (1..=PAGE_TASKS_MAX).contains(limit))
        .ok_or_else(|| bad("limit", format!("must be 1 to {PAGE_TASKS_MAX}")))
}

fn parse_cursor(text: &str) -> Result<(DateTime<Utc>, TaskId), Problem> {
    text.split_once('_')
        .and_then(|(micros, id)| {
            let time = DateTime::from_timestamp_micros(micros.parse().ok()?)?;
            // Beyond this Postgres has no time to compare with.
            let in_range = (0..=253_402_300_799).contains(&time.timestamp());
            in_range.then_some((time, parse_task_id(id).ok()?))
        })
        .ok_or_else(|| bad("cursor", "must be the next_cursor of the page before"))
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CancelBody {
    #[serde(default)]
    reason: Option<String>,
}

async fn cancel(
    State(app): State<App>,
    TaskInPath(task_id): TaskInPath,
    MaybeJsonBody(body): MaybeJsonBody<CancelBody>,
) -> Result<Json<Value>, Problem> {
    if let Some(reason) = &body.reason {
        limits::check_text("reason", reason, limits::REASON_BYTES_MAX).map_err(Problem::Invalid)?;
    }
    let (status, requested) = match app.store.task_cancel(task_id, body.reason.as_deref()).await? {
        Cancelled::Ended => (Status::Cancelled, false),
        Cancelled::Requested => (Status::Running, true),
        Cancelled::Before(status) => return Err(Problem::TaskEnded { task_id, status }),
        Cancelled::NotFound => return Err(Problem::TaskNotFound(task_id.to_string())),
    };
    Ok(Json(json!({ "task_id": task_id, "status": status, "cancel_requested": requested })))
}
