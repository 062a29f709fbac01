//! Workers: registration, presence, sign of life, farewell.

use axum::extract::State;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::App;
use super::extract::{Caller, JsonBody, WorkerInPath};
use super::problem::Problem;
use crate::domain::WorkerId;
use crate::domain::limits::{self, CAPABILITIES_MAX, CODEBASES_MAX, HOSTNAME_CHARS_MAX, Invalid};
use crate::store::{Registration, SeenWorker, Unregistered, WorkerState};

pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/v1/agent/workers", get(list))
        .route("/v1/agent/workers/register", post(register))
        .route("/v1/agent/workers/{id}/heartbeat", post(heartbeat))
        .route("/v1/agent/workers/{id}/unregister", post(unregister))
        .route("/v1/workers/connected", get(connected))
        .route("/v1/workers/{id}/status", get(status))
        .route("/v1/worker/connected", get(older_connected))
        .route("/v1/worker/codebases", put(set_codebases))
}

#[derive(Deserialize)]
struct RegisterBody {
    #[serde(default)]
    worker_id: Option<String>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    codebases: Option<Vec<String>>,
    #[serde(default)]
    hostname: Option<String>,
    #[serde(default)]
    metadata: Option<Map<String, Value>>,
    /// Older workers tell more of themselves: it is kept.
    #[serde(flatten)]
    rest: Map<String, Value>,
}

impl RegisterBody {
    fn check(self, worker_id: WorkerId) -> Result<Registration, Invalid> {
        if let Some(name) = &self.name {
            limits::check_name("name", name)?;
        }
        if let Some(hostname) = &self.hostname {
            if hostname.chars().count() > HOSTNAME_CHARS_MAX {
                let detail = format!("may have at most {HOSTNAME_CHARS_MAX} characters");
                return Err(Invalid::new("hostname", detail));
            }
            limits::check_no_nul("hostname", hostname)?;
        }
        let list = |field, list: Option<Vec<String>>, max| {
            list.map(|ids| limits::check_ids(field, ids, max)).transpose()
        };
        let metadata = match (self.metadata, self.rest.is_empty()) {
            (None, true) => None,
            (known, _) => {
                let mut all = self.rest;
                all.extend(known.unwrap_or_default());
                let all = Value::Object(all);
                limits::check_json("metadata", &all)?;
                Some(all)
            }
        };
        Ok(Registration {
            worker_id,
            name: self.name,
            codebases: list("codebases", self.codebases, CODEBASES_MAX)?,
            capabilities: list("capabilities", self.capabilities, CAPABILITIES_MAX)?,
            hostname: self.hostname,
            metadata,
        })
    }
}

async fn register(
    State(app): State<App>,
    caller: Caller,
    JsonBody(body): JsonBody<RegisterBody>,
) -> Result<Json<Value>, Problem> {
    let worker_id =
        caller.worker_if_named(body.worker_id.as_deref())?.unwrap_or_else(WorkerId::generate);
    let registration = body.check(worker_id).map_err(Problem::Invalid)?;
    let (worker_id, name) = app.store.worker_register(&registration).await?;
    tracing::info!(target: "worker_sse", %worker_id, name, "worker registered");
    Ok(Json(json!({ "worker_id": worker_id, "name": name, "registered": true })))
}

fn describe(worker: &WorkerState) -> Value {
    json!({
        "worker_id": worker.id,
        "name": worker.name,
        "codebases": worker.codebases,
        "capabilities": worker.capabilities,
        "hostname": worker.hostname,
        "metadata": worker.metadata,
        "registered_at": worker.registered_at,
        "connected": worker.connected,
        "last_heartbeat": worker.last_heartbeat,
    })
}

async fn list(State(app): State<App>) -> Result<Json<Vec<Value>>, Problem> {
    let workers = app.store.worker_list(None, false).await?;
    Ok(Json(workers.iter().map(describe).collect()))
}

async fn list_connected(app: &App) -> Result<Vec<Value>, Problem> {
    let workers = app.store.worker_list(None, true).await?;
    let describe = |worker: &WorkerState| {
        json!({
            "worker_id": worker.id,
            "name": worker.name,
            "connected_at": worker.connected_at,
            "last_heartbeat": worker.last_heartbeat,
            "connection_id": worker.connection_id,
            "replica_id": worker.replica_id,
            "replica_address": worker.replica_address,
            "codebases": worker.codebases,
            "capabilities": worker.capabilities,
        })
    };
    Ok(workers.iter().map(describe).collect())
}

async fn connected(State(app): State<App>) -> Result<Json<Vec<Value>>, Problem> {
    list_connected(&app).await.map(Json)
}

async fn older_connected(State(app): State<App>) -> Result<Json<Value>, Problem> {
    let workers = list_connected(&app).await?;
    Ok(Json(json!({ "count": workers.len(), "workers": workers })))
}

async fn status(
    State(app): State<App>,
    WorkerInPath(id): WorkerInPath,
) -> Result<Json<Value>, Problem> {
    let Some(worker) = app.store.worker_list(Some(&id), false).await?.into_iter().next() else {
        return Err(Problem::WorkerNotFound(id.to_string()));
    };
    let running = app.store.worker_running(&id).await?;
    let mut answer = describe(&worker);
    answer["registered"] = json!(true);
    answer["connected_at"] = json!(worker.connected_at);
    answer["connection_id"] = json!(worker.connection_id);
    answer["replica_id"] = json!(worker.replica_id);
    answer["replica_address"] = json!(worker.replica_address);
    answer["running_tasks"] = json!(running);
    Ok(Json(answer))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CodebasesBody {
    #[serde(default)]
    worker_id: Option<String>,
    codebases: Vec<String>,
}

async fn set_codebases(
    State(app): State<App>,
    caller: Caller,
    JsonBody(body): JsonBody<CodebasesBody>,
) -> Result<Json<Value>, Problem> {
    let worker_id = caller.worker(body.worker_id.as_deref())?;
    let codebases =
        limits::check_ids("codebases", body.codebases, CODEBASES_MAX).map_err(Problem::Invalid)?;
    if !app.store.worker_set_codebases(&worker_id, &codebases).await? {
        return Err(Problem::WorkerNotFound(worker_id.to_string()));
    }
    Ok(Json(json!({ "worker_id": worker_id, "codebases": codebases })))
}

async fn heartbeat(
    State(app): State<App>,
    WorkerInPath(id): WorkerInPath,
) -> Result<Json<Value>, Problem> {
    if app.store.worker_seen(&[SeenWorker::now(&id)]).await? == 0 {
        return Err(Problem::WorkerNotFound(id.to_string()));
    }
    let timeout_seconds = app.store.times().worker_timeout.as_secs();
    Ok(Json(json!({ "worker_id": id, "timeout_seconds": timeout_seconds })))
}

async fn unregister(
    State(app): State<App>,
    WorkerInPath(id): WorkerInPath,
) -> Result<Json<Value>, Problem> {
    app.seen.forget(&id);
    match app.store.worker_unregister(&id).await? {
        Unregistered::Gone(released) => {
            tracing::info!(target: "worker_sse", worker_id = %id, released, "worker unregistered");
            Ok(Json(json!({ "worker_id": id, "registered": false, "released_tasks": released })))
        }
        Unregistered::NotFound => Err(Problem::WorkerNotFound(id.to_string())),
    }
}
