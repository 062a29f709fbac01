//! Parses, asks the store, answers. One file per group of routes; nothing here writes SQL, and
//! nothing here pushes to a stream.

pub mod accept;
mod claim_next;
mod claims;
mod complete_many;
mod connection;
mod events;
mod extract;
mod feed;
mod finishes;
mod health;
mod in_flight;
mod problem;
mod request_body;
pub mod room;
mod socket;
mod stream;
mod stream_writer;
mod tasks;
mod workers;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use tokio::sync::Semaphore;

use crate::domain::ReplicaId;
use crate::domain::limits::CLAIM_WAIT_SECONDS_MAX;
use crate::maintenance::seen::Seen;
use crate::metrics::Metrics;
use crate::push::hub::Hub;
use crate::push::listener::Proof;
use crate::push::watch::Watch;
use crate::shutdown::Shutdown;
use crate::store::{Store, StoreError};
use problem::Problem;
use room::Room;

/// A request has this long to arrive and be answered. Streams have no end; only their beginning has.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);
/// Listings that are read at the same time: one by a rare filter reads much, and others must not wait.
const LISTINGS_IN_FLIGHT: usize = 4;
/// Requests that only read and that are answered at the same time: the rest of the connections to Postgres
/// stay for what must not wait, such as claims and the replica's own heartbeat.
const READS_IN_FLIGHT: usize = 12;
/// How long a read waits for its turn.
const READ_TURN_WAIT: Duration = Duration::from_millis(900);
/// Batches that are inserted at the same time.
const BATCHES_IN_FLIGHT: usize = 4;
/// KiB of batches that have arrived and are not inserted yet, in all.
const BATCH_KIB_IN_FLIGHT: usize = 128 * 1024;

/// What handlers need. Cheap to clone.
#[derive(Clone)]
pub struct App(Arc<Shared>);

/// The parts of an [`App`].
#[expect(missing_docs, reason = "each is documented at its type")]
pub struct Shared {
    pub store: Store,
    pub hub: Arc<Hub>,
    pub seen: Arc<Seen>,
    pub metrics: Arc<Metrics>,
    pub proof: Proof,
    pub shutdown: Shutdown,
    pub replica_id: ReplicaId,
    pub streams: StreamSettings,
    pub room: Arc<Room>,
    /// What the tasks that somebody follows are read for.
    pub watch: Arc<Watch>,
    batches: Semaphore,
    batch_kib: Semaphore,
    claims: Arc<Semaphore>,
    idle_claims: Arc<Semaphore>,
    listings: Semaphore,
    reads: Semaphore,
}

/// What the settings say about streams.
#[derive(Clone, Copy, Debug)]
pub struct StreamSettings {
    /// Off: 503.
    pub enabled: bool,
    /// A `keepalive` event after this much silence.
    pub keepalive: Duration,
    /// Announcements that may be outstanding on one stream.
    pub window: usize,
}

impl App {
    /// Puts the parts together.
    #[must_use]
    #[expect(clippy::too_many_arguments, reason = "one caller, and each part is of its own type")]
    pub fn new(
        store: Store,
        hub: Arc<Hub>,
        watch: Arc<Watch>,
        seen: Arc<Seen>,
        metrics: Arc<Metrics>,
        proof: Proof,
        shutdown: Shutdown,
        room: Arc<Room>,
        replica_id: ReplicaId,
        streams: StreamSettings,
    ) -> Self {
        let batches = Semaphore::new(BATCHES_IN_FLIGHT);
        Self(Arc::new(Shared {
            store,
            hub,
            seen,
            metrics,
            proof,
            shutdown,
            room,
            replica_id,
            streams,
            watch,
            batches,
            batch_kib: Semaphore::new(BATCH_KIB_IN_FLIGHT),
            claims: Arc::new(Semaphore::new(claim_next::CLAIMS_IN_FLIGHT)),
            idle_claims: Arc::new(Semaphore::new(claim_next::IDLE_CLAIMS_IN_FLIGHT)),
            listings: Semaphore::new(LISTINGS_IN_FLIGHT),
            reads: Semaphore::new(READS_IN_FLIGHT),
        }))
    }
}

impl std::ops::Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("replica_id", &self.replica_id).finish_non_exhaustive()
    }
}

/// Every route.
pub fn router(app: App) -> Router {
    Router::new()
        .merge(tasks::router())
        .merge(claims::router())
        .merge(finishes::router())
        .merge(claim_next::router())
        .merge(complete_many::router())
        .merge(events::router())
        .merge(workers::router())
        .merge(stream::router())
        .merge(health::router())
        .fallback(route_not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(app.clone(), observe))
        .with_state(app)
}

async fn route_not_found(method: Method, uri: Uri) -> Problem {
    Problem::RouteNotFound { method: method.to_string(), path: uri.path().to_owned() }
}

async fn method_not_allowed(method: Method, uri: Uri) -> Problem {
    Problem::MethodNotAllowed { method: method.to_string(), path: uri.path().to_owned() }
}

/// Streams take no turn among the reads: their first statement is a write or shared by all.
fn is_stream(path: &str) -> bool {
    path == "/v1/worker/tasks/stream" || path.ends_with("/events")
}

/// Holds every request to its deadline, and counts and logs its answer.
async fn observe(State(app): State<App>, request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let begun = std::time::Instant::now();
    // One route waits on purpose.
    let waits = if path == "/v1/tasks/claim" { CLAIM_WAIT_SECONDS_MAX } else { 0.0 };
    let deadline = REQUEST_DEADLINE + Duration::from_secs_f64(waits);
    let answer = async {
        if !(method == Method::GET && path.starts_with("/v1/")) || is_stream(&path) {
            return next.run(request).await;
        }
        match tokio::time::timeout(READ_TURN_WAIT, app.reads.acquire()).await {
            Ok(_turn) => next.run(request).await,
            Err(_) => Problem::Store(StoreError::Busy).into_response(),
        }
    };
    let response = match tokio::time::timeout(deadline, answer).await {
        Ok(response) => response,
        Err(_) => Problem::TooSlow { seconds: deadline.as_secs() }.into_response(),
    };
    let status = response.status().as_u16();
    app.metrics.response(status);
    tracing::debug!(%method, path, status, ms = begun.elapsed().as_millis(), "answered");
    response
}
