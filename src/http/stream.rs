//! `GET /v1/worker/tasks/stream`: a worker's open line.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::App;
use super::extract::{Caller, Params, header_or_param};
use super::feed::Feed;
use super::problem::Problem;
use super::room::StreamPlace;
use crate::domain::limits::{self, CAPABILITIES_MAX, CODEBASES_MAX, Invalid, SLOTS_MAX};
use crate::domain::routing::parse_list;
use crate::domain::{ConnectionId, WorkerId};
use crate::push::frames;
use crate::store::{Opened, StoreError, StreamAsk};

pub(super) fn router() -> Router<App> {
    Router::new().route("/v1/worker/tasks/stream", get(open).head(head))
}

async fn open(
    State(app): State<App>,
    caller: Caller,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if !app.streams.enabled {
        return Err(Problem::StreamsDisabled);
    }
    if app.shutdown.is_draining() {
        return Err(Problem::Draining);
    }
    let both = |header, param| header_or_param(&headers, header, &params, param);
    let slots = both("x-worker-slots", "slots")?.map(parse_slots).transpose()?;
    let list = |text: Option<&str>, field, max| {
        text.map(|text| parse_list(field, text, max)).transpose().map_err(Problem::BadParameter)
    };
    let name = both("x-agent-name", "agent_name")?;
    if let Some(name) = name {
        limits::check_name("agent_name", name).map_err(Problem::BadParameter)?;
    }
    let ask = StreamAsk {
        worker_id: caller.worker_if_named(None)?.unwrap_or_else(WorkerId::generate),
        name: name.map(str::to_owned),
        codebases: list(both("x-codebases", "codebases")?, "codebases", CODEBASES_MAX)?,
        capabilities: list(
            both("x-capabilities", "capabilities")?,
            "capabilities",
            CAPABILITIES_MAX,
        )?,
        connection_id: ConnectionId::generate(),
        replica_id: app.replica_id,
        slots: slots.and_then(|count| i32::try_from(count).ok()),
    };
    let wants_task = wants_task(params.get("events")?)?;
    if slots.is_some() && !wants_task {
        let detail = "must not leave out `task`: a stream with slots has no other event of a task";
        return Err(Problem::BadParameter(Invalid::new("events", detail)));
    }
    let place = app.room.enter_stream().ok_or(Problem::TooManyStreams)?;

    // In a task of its own: a client that hangs up here must not leave a presence without stream.
    let feed = tokio::spawn(subscribe(app, ask, wants_task, slots, place))
        .await
        .map_err(|_| Problem::Store(StoreError::Busy))??;
    Ok(feed.into_response())
}

/// To ask for the head alone changes nothing: it must not end the worker's stream for one that is
/// over before it began.
async fn head() -> impl IntoResponse {
    stream_headers()
}

pub(super) fn stream_headers() -> [(HeaderName, &'static str); 3] {
    [
        (CONTENT_TYPE, "text/event-stream"),
        (CACHE_CONTROL, "no-cache, no-transform"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ]
}

/// `?events=` chooses between the two events of a task: the announcement alone, or both.
fn wants_task(events: Option<&str>) -> Result<bool, Problem> {
    let Some(events) = events else {
        return Ok(true);
    };
    let wanted: Vec<_> = events.split(',').map(str::trim).collect();
    if !wanted.contains(&"task_available")
        || wanted.iter().any(|event| !["task_available", "task"].contains(event))
    {
        let detail = "must be `task_available` or `task_available,task`";
        return Err(Problem::BadParameter(Invalid::new("events", detail)));
    }
    Ok(wanted.contains(&"task"))
}

/// How many tasks at a time the server is to claim for the worker.
fn parse_slots(text: &str) -> Result<usize, Problem> {
    let count = text.parse().ok().filter(|count| (1..=SLOTS_MAX).contains(count));
    let detail = || format!("must be 1 to {SLOTS_MAX}");
    count.ok_or_else(|| Problem::BadParameter(Invalid::new("slots", detail())))
}

async fn subscribe(
    app: App,
    ask: StreamAsk,
    wants_task: bool,
    slots: Option<usize>,
    place: StreamPlace,
) -> Result<Feed, Problem> {
    let connection_id = ask.connection_id;
    let worker_id = ask.worker_id.clone();
    let routing = match app.store.stream_open(ask).await {
        Ok(Opened::Open(routing)) => routing,
        Ok(Opened::Superseded) => return Err(Problem::Superseded),
        // The others have buried this replica; its next heartbeat brings it back.
        Err(StoreError::Refused { .. }) => return Err(Problem::Store(StoreError::Busy)),
        Err(error) => {
            if !error.was_never_sent() {
                // It may have been written all the same, and its answer lost.
                app.hub.depart(vec![(worker_id, connection_id)]);
            }
            return Err(error.into());
        }
    };
    let keepalive = app.streams.keepalive;
    let first = frames::connected(
        &routing.worker_id,
        connection_id,
        app.replica_id,
        keepalive.as_secs(),
        slots,
        rand::random_range(frames::RETRY_MS),
    );
    tracing::info!(
        target: "worker_sse", worker_id = %routing.worker_id, %connection_id,
        codebases = routing.codebases.join(","), "stream opened"
    );
    let window = app.streams.window;
    let stream = app.hub.subscribe(connection_id, routing, window, wants_task, slots, first);
    if app.shutdown.is_draining() {
        // The drain may have passed before this stream was there.
        app.hub.end(&stream, frames::End::Draining);
    }
    Ok(Feed::new(stream, Arc::clone(&app.hub), keepalive, place))
}
