//! How claims end: complete, fail, release; and the next task in the answer to a complete.

use std::time::Duration;

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::App;
use super::claim_next;
use super::claims::ClaimAnswer;
use super::extract::{Caller, MaybeJsonBody, Params, TaskInPath};
use super::problem::Problem;
use crate::domain::limits::{self, ERROR_BYTES_MAX, Invalid, RETRY_AFTER_SECONDS_MAX, cut};
use crate::domain::{Fence, Status, TaskId, WorkerId};
use crate::push::slots::GONE_FOR;
use crate::store::{Finish, FinishAsk, Finished, FreedAsk, NextAsk, StoreError, Verb};

/// How long the claim of the next task waits for its turn. Less than a slot stays reserved on another replica.
const NEXT_TURN_WAIT: Duration = Duration::from_millis(500);
const _: () = assert!(NEXT_TURN_WAIT.as_millis() < GONE_FOR.as_millis());

pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/v1/tasks/{id}/complete", post(complete))
        .route("/v1/tasks/{id}/fail", post(fail))
        .route("/v1/tasks/{id}/release", post(release))
}

/// Where the task stands after its claim ended.
#[derive(Serialize)]
pub(super) struct FinishAnswer {
    task_id: TaskId,
    pub(super) status: Status,
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

#[derive(Serialize)]
struct CompleteAnswer {
    #[serde(flatten)]
    finish: FinishAnswer,
    /// If the worker asked for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<NextTask>,
}

/// The best task that there was; null: there was none.
#[derive(Serialize)]
#[serde(transparent)]
struct NextTask(Option<ClaimAnswer>);

async fn complete(
    State(app): State<App>,
    TaskInPath(task_id): TaskInPath,
    caller: Caller,
    params: Params,
    MaybeJsonBody(body): MaybeJsonBody<CompleteBody>,
) -> Result<Json<CompleteAnswer>, Problem> {
    let worker_id = caller.worker(body.worker_id.as_deref())?;
    check_result(body.result.as_ref())?;
    let (epoch, verb) = (body.claim_epoch, Verb::Complete(body.result));
    if !wants_next(params.get("next")?)? {
        let finish = finish(&app, task_id, worker_id, epoch, verb).await?;
        return Ok(Json(CompleteAnswer { finish, next: None }));
    }
    // In a task of its own: a client that hangs up must not leave a slot between two tasks.
    let both = complete_for_next(app, task_id, worker_id, epoch, verb);
    tokio::spawn(both).await.map_err(|_| Problem::Store(StoreError::Busy))?.map(Json)
}

fn wants_next(text: Option<&str>) -> Result<bool, Problem> {
    match text {
        None | Some("0") => Ok(false),
        Some("1") => Ok(true),
        Some(_) => Err(Problem::BadParameter(Invalid::new("next", "must be 0 or 1"))),
    }
}

/// Completes, and then claims the best task that there is for the worker. When nobody knows what became of that
/// claim the call is refused, and its repetition finds both: a task must not stay with a worker that was not
/// told of it.
async fn complete_for_next(
    app: App,
    task_id: TaskId,
    worker_id: WorkerId,
    claim_epoch: Option<i64>,
    verb: Verb,
) -> Result<CompleteAnswer, Problem> {
    let finish = end(&app, task_id, &worker_id, claim_epoch, verb).await?;
    let epoch = finish.claim_epoch;
    let slot = app.hub.finished_for_next(&worker_id, task_id, epoch);
    // The repetition of a call whose answer was lost gets the same task.
    let claim_id = Some(next_claim_id(task_id, epoch));
    let ask = NextAsk { worker_id: worker_id.clone(), count: 1, claim_id };
    let next = match claim_next::look(&app, &ask, &app.claims, NEXT_TURN_WAIT).await {
        Ok(mut tasks) => Ok(tasks.pop()),
        // It was claimed before, and has ended since.
        Err(Problem::ClaimIdSpent) => Ok(None),
        Err(problem) => Err(problem),
    };
    let came = next.as_ref().ok().and_then(|next| next.as_ref());
    let came = came.map(|next| (next.task.id, next.task.claim_epoch));
    if let Some(slot) = slot {
        app.hub.next_came(slot, came);
    } else {
        // In one hint, and before the worker can end the next one: what the other replica hears is in order.
        let came = came.map(|(id, _)| id);
        tell_elsewhere(app, worker_id, task_id, came).await;
    }
    Ok(CompleteAnswer { finish, next: Some(NextTask(next?)) })
}

/// The id of the claim that follows a claim.
fn next_claim_id(task: TaskId, epoch: i64) -> Uuid {
    let mut bytes = task.0.into_bytes();
    for (byte, other) in bytes[8..].iter_mut().zip(epoch.to_be_bytes()) {
        *byte ^= other;
    }
    // Version 8, which is for such uses: like no id of a client.
    bytes[6] = bytes[6] & 0x0f | 0x80;
    Uuid::from_bytes(bytes)
}

/// Tells the replica that has the worker's stream, if that has slots. What is not told is found by the next
/// look.
async fn tell_elsewhere(app: App, worker_id: WorkerId, ended: TaskId, came: Option<TaskId>) {
    let ask = FreedAsk { worker_id, ended, came, replica_id: app.replica_id };
    let _ = app.store.slots_freed(ask).await;
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

pub(super) fn check_result(result: Option<&Value>) -> Result<(), Problem> {
    result.map_or(Ok(()), |result| limits::check_json("result", result).map_err(Problem::Invalid))
}

/// An error's text is cut, not refused: a stack trace that is too long must not cost the report.
pub(super) fn check_error(error: Option<String>) -> Result<Option<String>, Problem> {
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

/// Ends a claim, and tells whoever has the worker's stream. In a task of its own: a client that hangs up must
/// not leave a slot taken.
pub(super) async fn finish(
    app: &App,
    task_id: TaskId,
    worker_id: WorkerId,
    claim_epoch: Option<i64>,
    verb: Verb,
) -> Result<FinishAnswer, Problem> {
    let app = app.clone();
    let finish = async move {
        let answer = end(&app, task_id, &worker_id, claim_epoch, verb).await?;
        if !app.hub.finished(&worker_id, task_id, answer.claim_epoch) {
            // Nobody waits for it.
            tokio::spawn(tell_elsewhere(app, worker_id, task_id, None));
        }
        Ok(answer)
    };
    tokio::spawn(finish).await.map_err(|_| Problem::Store(StoreError::Busy))?
}

async fn end(
    app: &App,
    task_id: TaskId,
    worker_id: &WorkerId,
    claim_epoch: Option<i64>,
    verb: Verb,
) -> Result<FinishAnswer, Problem> {
    let worker_id = worker_id.clone();
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
