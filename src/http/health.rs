//! Is it alive, is it ready, how is it doing.

use std::time::Duration;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::App;
use super::problem::Problem;

/// How long `/readyz` waits for Postgres.
const POSTGRES_WAIT: Duration = Duration::from_secs(2);

pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
}

/// The process answers. Nothing else is asked: restarting it would not bring Postgres back.
async fn healthz() -> Json<Value> {
    Json(json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION") }))
}

/// Whether a load balancer should send requests here; if not, every reason at once. What is only not
/// as safe as promised is a warning.
async fn readyz(State(app): State<App>) -> Result<Json<Value>, Problem> {
    let mut reasons = Vec::new();
    if app.shutdown.is_draining() {
        reasons.push("this replica is draining".to_owned());
    }
    let mut warnings = Vec::new();
    match tokio::time::timeout(POSTGRES_WAIT, app.store.condition()).await {
        Ok(Ok(condition)) => {
            for danger in condition.dangers {
                let said = danger.to_string();
                if danger.is_stopping() { reasons.push(said) } else { warnings.push(said) }
            }
        }
        Ok(Err(error)) => reasons.push(error.to_string()),
        Err(_) => reasons.push("Postgres does not answer".to_owned()),
    }
    if !app.proof.is_fresh() {
        reasons.push("notifications do not arrive (no canary came back for 10 s)".to_owned());
    }
    if !reasons.is_empty() {
        // A warning may well be the cause.
        reasons.append(&mut warnings);
        return Err(Problem::NotReady(reasons.join("; ")));
    }
    Ok(Json(json!({
        "status": "ready",
        "replica_id": app.replica_id,
        "streams": app.hub.len(),
        "warnings": warnings,
    })))
}

async fn metrics(State(app): State<App>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], app.metrics.render()).into_response()
}
