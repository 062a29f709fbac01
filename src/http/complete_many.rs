//! `POST /v1/tasks/complete`: many claims of one worker end in one call. Each stands by itself.

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::App;
use super::extract::{Caller, JsonBody, parse_task_id};
use super::finishes::{FinishAnswer, check_result, finish};
use super::problem::{Problem, Wire};
use crate::domain::TaskId;
use crate::domain::limits::{COMPLETES_MAX, Invalid};
use crate::store::{StoreError, Verb};

pub(super) fn router() -> Router<App> {
    Router::new().route("/v1/tasks/complete", post(complete_many))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    #[serde(default)]
    worker_id: Option<String>,
    tasks: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    task_id: String,
    #[serde(default)]
    claim_epoch: Option<i64>,
    #[serde(default)]
    result: Option<Value>,
}

#[derive(Serialize)]
struct Answer {
    /// In the order of the tasks.
    results: Vec<Ended>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Ended {
    Finished(FinishAnswer),
    Refused { task_id: TaskId, problem: Wire },
}

/// All of it is checked before anything is done. What is refused by its fence, or since somebody has its row
/// locked, is refused alone; when Postgres is away the whole call is, and its repetition finds what took effect.
async fn complete_many(
    State(app): State<App>,
    caller: Caller,
    JsonBody(body): JsonBody<Body>,
) -> Result<Json<Answer>, Problem> {
    let worker_id = caller.worker(body.worker_id.as_deref())?;
    if body.tasks.len() > COMPLETES_MAX {
        let detail = format!("must be {COMPLETES_MAX} at most, not {}", body.tasks.len());
        return Err(Problem::Invalid(Invalid::new("tasks", detail)));
    }
    let mut asked = Vec::with_capacity(body.tasks.len());
    for entry in body.tasks {
        check_result(entry.result.as_ref())?;
        asked.push((parse_task_id(&entry.task_id)?, entry.claim_epoch, entry.result));
    }
    // Together in the queue, they share statements.
    let calls = asked.into_iter().map(|(task_id, epoch, result)| {
        let (app, worker_id) = (&app, worker_id.clone());
        async move {
            match finish(app, task_id, worker_id, epoch, Verb::Complete(result)).await {
                Ok(answer) => Ok(Ended::Finished(answer)),
                Err(problem @ Problem::Store(StoreError::Unavailable(_) | StoreError::Busy)) => {
                    Err(problem)
                }
                Err(problem) => Ok(Ended::Refused { task_id, problem: problem.wire() }),
            }
        }
    });
    let results = join_all(calls).await.into_iter().collect::<Result<_, _>>()?;
    Ok(Json(Answer { results }))
}
