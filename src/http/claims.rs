//! Claims: claim, heartbeat, and in the words of the older server claim and release.

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::App;
use super::extract::{Caller, JsonBody, MaybeJsonBody, TaskInPath, parse_task_id};
use super::finishes::{check_error, check_result, finish};
use super::problem::Problem;
use crate::domain::limits::{self, Invalid};
use crate::domain::{Asked, Fence, Task, TaskId};
use crate::store::{Claim, ClaimAsk, Claimed, Heartbeat, HeartbeatAsk, Verb};

pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/v1/tasks/{id}/claim", post(claim))
        .route("/v1/tasks/{id}/heartbeat", post(heartbeat))
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
    match claim {
        Claim::Taken { by: None } => app.hub.missed(&worker_id, task_id),
        Claim::NotRouted | Claim::UnknownWorker => app.hub.declined(&worker_id, task_id),
        _ => app.hub.acted(&worker_id, task_id),
    }
    let (outcome, answer) = match claim {
        Claim::Claimed(claimed) => {
            app.hub.claimed(&worker_id, task_id, claimed.task.claim_epoch);
            ("claimed", Ok(claimed.into()))
        }
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
    let fence = Fence { task_id, worker_id: worker_id.clone(), claim_epoch };
    let ask = HeartbeatAsk { fence, progress, message, checkpoint };
    let (outcome, answer) = match app.store.task_heartbeat(ask).await? {
        Heartbeat::Alive { lease, cancel_requested, claim_epoch } => {
            app.hub.acted_on(&worker_id, task_id);
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
