//! Claims: claim, heartbeat, complete, fail, release, and the same in the words of the older server.

use std::time::Duration;

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::App;
use super::extract::{Caller, JsonBody, MaybeJsonBody, TaskInPath, parse_task_id};
use super::problem::Problem;
use crate::domain::limits::{self, ERROR_BYTES_MAX, Invalid, RETRY_AFTER_SECONDS_MAX, cut};
use crate::domain::{Asked, Fence, Status, Task, TaskId, WorkerId};
use crate::store::{
    Claim, ClaimAsk, Claimed, Finish, FinishAsk, Finished, Heartbeat, HeartbeatAsk, Verb,
};

pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/v1/tasks/{id}/claim", post(claim))
        .route("/v1/tasks/{id}/heartbeat", post(heartbeat))
        .route("/v1/tasks/{id}/complete", post(complete))
        .route("/v1/tasks/{id}/fail", post(fail))
        .route("/v1/tasks/{id}/release", post(release))
        .route("/v1/worker/tasks/claim", post(older_claim))
        .route("/v1/worker/tasks/release", post(older_release))
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClaimBody {
    #[serde(default)]
    worker_id: Option<String>,
    #[serde(default)]
    claim_id: Option<Uuid>,
}

/// The answer to a claim: the whole task and how long the claim lives.
#[derive(Serialize)]
pub(super) struct ClaimAnswer {
    #[serde(flatten)]
    pub(super) task: Task,
    /// Seconds.
    lease_expires_in: u64,
}

impl From<Claimed> for ClaimAnswer {
    fn from(Claimed { task, lease }: Claimed) -> Self {
        Self { task, lease_expires_in: lease.as_secs() }
    }
}

async fn claim(
    State(app): State<App>,
    TaskInPath(task_id): TaskInPath,
    caller: Caller,
    MaybeJsonBody(body): MaybeJsonBody<ClaimBody>,
) -> Result<Json<ClaimAnswer>, Problem> {
    let worker_id = caller.worker(body.worker_id.as_deref())?;
    claim_one(&app, ClaimAsk { task_id, worker_id, claim_id: body.claim_id }).await.map(Json)
}

async fn claim_one(app: &App, ask: ClaimAsk) -> Result<ClaimAnswer, Problem> {
    let (task_id, worker_id) = (ask.task_id, ask.worker_id.clone());
    // To ask is proof that the worker has read its stream so far, whatever the answer.
    let is_here = app.hub.asked(&worker_id, Asked::Task(task_id));
    let claim = app.store.task_claim(ask).await?;
    // A stream elsewhere learns of a task that was won from its row.
    if !is_here && !matches!(claim, Claim::Claimed(_)) {
        app.seen.note_asked(&worker_id, Asked::Task(task_id));
    }
    // A claim that another one is about to win is not settled yet: the task may stay claimable.
    if matches!(claim, Claim::Taken { by: None }) {
        app.hub.missed(&worker_id, task_id);
    } else {
        app.hub.acted(&worker_id, task_id);
    }
    if matches!(claim, Claim::NotRouted | Claim::UnknownWorker) {
        app.hub.declined(task_id);
    }
    let (outcome, answer) = match claim {
        Claim::Claimed(claimed) => ("claimed", Ok(claimed.into())),
        Claim::Taken { by } => ("taken", Err(Problem::AlreadyClaimed { task_id, by })),
        Claim::Over(lost) => ("over", Err(Problem::ClaimLost { task_id, lost })),
        Claim::Ended(status) => ("ended", Err(Problem::TaskEnded { task_id, status })),
        Claim::NotDue => ("not_due", Err(Problem::TaskNotDue(task_id))),
        Claim::Expired => ("expired", Err(Problem::TaskExpired(task_id))),
        Claim::NotRouted => ("not_routed", Err(Problem::NotRouted(task_id))),
        Claim::UnknownWorker => {
            ("unknown_worker", Err(Problem::UnknownWorker(worker_id.to_string())))
        }
        Claim::NotFound => ("not_found", Err(Problem::TaskNotFound(task_id.to_string()))),
    };
    app.metrics.claim(outcome);
    answer
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeartbeatBody {
    #[serde(default)]
    worker_id: Option<String>,
    #[serde(default)]
    claim_epoch: Option<i64>,
    #[serde(default)]
    progress: Option<f64>,
    #[serde(default)]
    message: Option<String>,
    #[serde(default)]
    checkpoint: Option<Value>,
}

#[derive(Serialize)]
struct HeartbeatAnswer {
    task_id: TaskId,
    claim_epoch: i64,
    /// Seconds.
    lease_expires_in: f64,
    cancel_requested: bool,
}

async fn heartbeat(
    State(app): State<App>,
    TaskInPath(task_id): TaskInPath,
    caller: Caller,
    MaybeJsonBody(body): MaybeJsonBody<HeartbeatBody>,
) -> Result<Json<HeartbeatAnswer>, Problem> {
    let worker_id = caller.worker(body.worker_id.as_deref())?;
    let HeartbeatBody { claim_epoch, progress, message, checkpoint, .. } = body;
    check_heartbeat(progress, message.as_deref(), checkpoint.as_ref()).map_err(Problem::Invalid)?;
    let fence = Fence { task_id, worker_id, claim_epoch };
    let ask = HeartbeatAsk { fence, progress, message, checkpoint };
    let (outcome, answer) = match app.store.task_heartbeat(ask).await? {
        Heartbeat::Alive { lease, cancel_requested, claim_epoch } => {
            // To the millisecond; rounded down, so that nobody relies on more than there is.
            let lease_expires_in = (lease.as_secs_f64() * 1000.0).floor() / 1000.0;
            let answer =
                HeartbeatAnswer { task_id, claim_epoch, lease_expires_in, cancel_requested };
            ("alive", Ok(Json(answer)))
        }
        Heartbeat::Lost(lost) => ("lost", Err(Problem::ClaimLost { task_id, lost })),
        Heartbeat::NotFound => ("not_found", Err(Problem::TaskNotFound(task_id.to_string()))),
    };
    app.metrics.heartbeat(outcome);
    answer
}

fn check_heartbeat(
    progress: Option<f64>,
    message: Option<&str>,
    checkpoint: Option<&Value>,
) -> Result<(), Invalid> {
    if progress.is_some_and(|progress| !(0.0..=1.0).contains(&progress)) {
        return Err(Invalid::new("progress", "must be 0 to 1"));
    }
    if let Some(message) = message {
        limits::check_text("message", message, limits::MESSAGE_BYTES_MAX)?;
    }
    checkpoint.map_or(Ok(()), |checkpoint| limits::check_json("checkpoint", checkpoint))
}

/// Where the task stands after its claim ended.
#[derive(Serialize)]
struct FinishAnswer {
    task_id: TaskId,
    status: Status,
    attempt: i32,
    max_attempts: i32,
    claim_epoch: i64,
    /// When it is pending again: seconds until it may be claimed.
    #[serde(skip_serializing_if = "Option::is_none")]
    run_in: Option<f64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CompleteBody {
    #[serde(default)]
    worker_id: Option<String>,
    #[serde(default)]
    claim_epoch: Option<i64>,
    #[serde(default)]
    result: Option<Value>,
}

async fn complete(
    State(app): State<App>,
    TaskInPath(task_id): TaskInPath,
    caller: Caller,
    MaybeJsonBody(body): MaybeJsonBody<CompleteBody>,
) -> Result<Json<FinishAnswer>, Problem> {
    let worker_id = caller.worker(body.worker_id.as_deref())?;
    check_result(body.result.as_ref())?;
    finish(&app, task_id, worker_id, body.claim_epoch, Verb::Complete(body.result)).await.map(Json)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FailBody {
    worker_id: Option<String>,
    claim_epoch: Option<i64>,
    error: Option<String>,
    retry: bool,
    retry_after_seconds: Option<f64>,
}

impl Default for FailBody {
    fn default() -> Self {
        Self {
            worker_id: None,
            claim_epoch: None,
            error: None,
            retry: true,
            retry_after_seconds: None,
        }
    }
}

async fn fail(
    State(app): State<App>,
    TaskInPath(task_id): TaskInPath,
    caller: Caller,
    MaybeJsonBody(body): MaybeJsonBody<FailBody>,
) -> Result<Json<FinishAnswer>, Problem> {
    let worker_id = caller.worker(body.worker_id.as_deref())?;
    let retry_after = match body.retry_after_seconds {
        Some(seconds) if (0.0..=RETRY_AFTER_SECONDS_MAX).contains(&seconds) => {
            Some(Duration::from_secs_f64(seconds))
        }
        Some(_) => {
            let detail = format!("must be 0 to {RETRY_AFTER_SECONDS_MAX}");
            return Err(Problem::Invalid(Invalid::new("retry_after_seconds", detail)));
        }
        None => None,
    };
    let error = check_error(body.error)?;
    let verb = Verb::Fail { error, retry: body.retry, retry_after };
    finish(&app, task_id, worker_id, body.claim_epoch, verb).await.map(Json)
}

fn check_result(result: Option<&Value>) -> Result<(), Problem> {
    result.map_or(Ok(()), |result| limits::check_json("result", result).map_err(Problem::Invalid))
}

/// An error's text is cut, not refused: a stack trace that is too long must not cost the report.
fn check_error(error: Option<String>) -> Result<Option<String>, Problem> {
    let Some(error) = error else { return Ok(None) };
    limits::check_no_nul("error", &error).map_err(Problem::Invalid)?;
    Ok(Some(cut(&error, ERROR_BYTES_MAX).to_owned()))
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReleaseBody {
    #[serde(default)]
    worker_id: Option<String>,
    #[serde(default)]
    claim_epoch: Option<i64>,
}

async fn release(
    State(app): State<App>,
    TaskInPath(task_id): TaskInPath,
    caller: Caller,
    MaybeJsonBody(body): MaybeJsonBody<ReleaseBody>,
) -> Result<Json<FinishAnswer>, Problem> {
    let worker_id = caller.worker(body.worker_id.as_deref())?;
    finish(&app, task_id, worker_id, body.claim_epoch, Verb::Release).await.map(Json)
}

async fn finish(
    app: &App,
    task_id: TaskId,
    worker_id: WorkerId,
    claim_epoch: Option<i64>,
    verb: Verb,
) -> Result<FinishAnswer, Problem> {
    let ask = FinishAsk { fence: Fence { task_id, worker_id, claim_epoch }, verb };
    let (outcome, answer) = match app.store.task_finish(ask).await? {
        Finish::Finished(Finished { status, attempt, max_attempts, claim_epoch, run_in }) => {
            let run_in = (status == Status::Pending).then_some(run_in.as_secs_f64());
            let answer =
                FinishAnswer { task_id, status, attempt, max_attempts, claim_epoch, run_in };
            (status.as_str(), Ok(answer))
        }
        Finish::Lost(lost) => ("lost", Err(Problem::ClaimLost { task_id, lost })),
        Finish::NotFound => ("not_found", Err(Problem::TaskNotFound(task_id.to_string()))),
    };
    app.metrics.finish(outcome);
    answer
}

/// Older workers send more than is needed here; what is not known is ignored.
#[derive(Deserialize)]
struct OlderClaimBody {
    task_id: String,
    #[serde(default)]
    worker_id: Option<String>,
}

async fn older_claim(
    State(app): State<App>,
    caller: Caller,
    JsonBody(body): JsonBody<OlderClaimBody>,
) -> Result<Json<Value>, Problem> {
    let worker_id = caller.worker(body.worker_id.as_deref())?;
    let task_id = parse_task_id(&body.task_id)?;
    let answer =
        claim_one(&app, ClaimAsk { task_id, worker_id: worker_id.clone(), claim_id: None }).await?;
    Ok(Json(json!({
        "success": true,
        "task_id": task_id,
        "worker_id": worker_id,
        "claim_epoch": answer.task.claim_epoch,
        "task": answer,
    })))
}

#[derive(Deserialize)]
struct OlderReleaseBody {
    task_id: String,
    status: String,
    #[serde(default)]
    worker_id: Option<String>,
    #[serde(default)]
    claim_epoch: Option<i64>,
    #[serde(default)]
    result: Option<Value>,
    #[serde(default)]
    error: Option<String>,
}

async fn older_release(
    State(app): State<App>,
    caller: Caller,
    JsonBody(body): JsonBody<OlderReleaseBody>,
) -> Result<Json<Value>, Problem> {
    let worker_id = caller.worker(body.worker_id.as_deref())?;
    let task_id = parse_task_id(&body.task_id)?;
    check_result(body.result.as_ref())?;
    let error = check_error(body.error)?;
    let verb = match body.status.as_str() {
        "completed" => Verb::Complete(body.result),
        // The older server knew no retries: failed meant failed for good.
        "failed" => Verb::Fail { error, retry: false, retry_after: None },
        "cancelled" => Verb::Cancel { error },
        _ => {
            let detail = "must be completed, failed or cancelled";
            return Err(Problem::Invalid(Invalid::new("status", detail)));
        }
    };
    let answer = finish(&app, task_id, worker_id.clone(), body.claim_epoch, verb).await?;
    Ok(Json(json!({
        "success": true,
        "task_id": task_id,
        "worker_id": worker_id,
        "status": answer.status,
    })))
}
