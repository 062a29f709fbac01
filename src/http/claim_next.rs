//! `POST /v1/tasks/claim`: the best tasks for a worker that cannot hold a stream.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use uuid::Uuid;

use super::App;
use super::claims::ClaimAnswer;
use super::extract::{Caller, MaybeJsonBody};
use super::problem::Problem;
use crate::domain::limits::{CLAIM_TASKS_MAX, CLAIM_WAIT_SECONDS_MAX, Invalid};
use crate::domain::{Asked, Fence, Routing, TaskId, WorkerId};
use crate::push::waiters::Waiter;
use crate::shutdown::{Stage, jittered};
use crate::store::{Claimed, FinishAsk, Next, NextAsk, StoreError, Verb};

/// Statements of these calls at the same time: each holds a connection of the pool.
pub(super) const CLAIMS_IN_FLIGHT: usize = 4;
/// The same of those who look without having been woken.
pub(super) const IDLE_CLAIMS_IN_FLIGHT: usize = 1;
/// How long a call waits for its turn.
const TURN_WAIT: Duration = Duration::from_secs(2);
/// When a call that waits first looks by itself, besides when it is woken, and then after twice as long
/// each time: the net under the wake-ups.
const LOOK_EVERY: Duration = Duration::from_secs(10);

pub(super) fn router() -> Router<App> {
    Router::new().route("/v1/tasks/claim", post(claim_next))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct NextBody {
    worker_id: Option<String>,
    n: i64,
    wait: f64,
    claim_id: Option<Uuid>,
}

impl Default for NextBody {
    fn default() -> Self {
        Self { worker_id: None, n: 1, wait: 0.0, claim_id: None }
    }
}

#[derive(Serialize)]
struct NextAnswer {
    /// Best first; none: there was none.
    tasks: Vec<ClaimAnswer>,
}

async fn claim_next(
    State(app): State<App>,
    caller: Caller,
    MaybeJsonBody(body): MaybeJsonBody<NextBody>,
) -> Result<Json<NextAnswer>, Problem> {
    let worker_id = caller.worker(body.worker_id.as_deref())?;
    if !(1..=CLAIM_TASKS_MAX).contains(&body.n) {
        let detail = format!("must be 1 to {CLAIM_TASKS_MAX}");
        return Err(Problem::Invalid(Invalid::new("n", detail)));
    }
    if !(0.0..=CLAIM_WAIT_SECONDS_MAX).contains(&body.wait) {
        let detail = format!("must be 0 to {CLAIM_WAIT_SECONDS_MAX} seconds");
        return Err(Problem::Invalid(Invalid::new("wait", detail)));
    }
    // Its stream must not end by age now: whoever waits here does not read there.
    if !app.hub.asked(&worker_id, Asked::Best) {
        app.seen.note_asked(&worker_id, Asked::Best);
    }
    let ask = NextAsk { worker_id, count: body.n, claim_id: body.claim_id };
    let tasks = if body.wait > 0.0 {
        let until = Instant::now() + Duration::from_secs_f64(body.wait);
        wait_for_some(&app, &ask, until).await?
    } else {
        let tasks = look(&app, &ask, &app.claims, TURN_WAIT).await?;
        if tasks.is_empty() {
            routing_of(&app, &ask.worker_id).await?;
        }
        tasks
    };
    if tasks.is_empty() {
        app.metrics.claim("none");
    }
    Ok(Json(NextAnswer { tasks }))
}

/// Looks until there is something, or the time is up, or the replica drains: then another one answers.
async fn wait_for_some(
    app: &App,
    ask: &NextAsk,
    until: Instant,
) -> Result<Vec<ClaimAnswer>, Problem> {
    // Before the first look, so that nothing falls between the two.
    let waiter = app.hub.waiters.enter(ask.worker_id.clone());
    let waiter = waiter.ok_or(Problem::Store(StoreError::Busy))?;
    let (mut turns, mut pause) = (&app.claims, LOOK_EVERY);
    loop {
        if waiter.look() {
            waiter.reroute(routing_of(app, &ask.worker_id).await?);
        }
        let ends = app.shutdown.is_draining() || Instant::now() >= until;
        let is_soon = match look(app, ask, turns, TURN_WAIT).await {
            Ok(tasks) if !tasks.is_empty() => {
                waiter.leave_with(&tasks.iter().map(|answer| answer.task.id).collect());
                return Ok(tasks);
            }
            Ok(_) => {
                let had_reason = Arc::ptr_eq(turns, &app.claims);
                waiter.found_nothing(&gone(app, &waiter).await);
                // What is there and was not to be had is locked, and nobody tells when it no longer is.
                had_reason && !ends && is_something_there(app, &ask.worker_id).await
            }
            // It has time. The news stay at hand for its next look.
            Err(Problem::Store(StoreError::Busy | StoreError::Contended(_))) if !ends => {
                !waiter.at_hand().is_empty()
            }
            Err(problem) => return Err(problem),
        };
        if ends {
            return Ok(Vec::new());
        }
        let wait = jittered(if is_soon { TURN_WAIT } else { pause });
        let is_woken = tokio::select! {
            () = waiter.woken() => true,
            () = sleep_until(until) => true,
            () = app.shutdown.reached(Stage::Draining) => true,
            () = tokio::time::sleep(wait) => is_soon,
        };
        // Who looks without a reason leaves the turns to those who have one, and looks ever less often.
        (turns, pause) =
            if is_woken { (&app.claims, LOOK_EVERY) } else { (&app.idle_claims, pause * 2) };
        app.seen.note(&ask.worker_id);
    }
}

/// Whether there is a task that the worker could claim, as far as can be seen without a lock.
async fn is_something_there(app: &App, worker_id: &WorkerId) -> bool {
    let Ok(_turn) = turn(&app.claims, TURN_WAIT).await else { return true };
    let backlog = app.store.push_backlog(std::slice::from_ref(worker_id), 1).await;
    backlog.is_ok_and(|backlogs| backlogs.iter().any(|backlog| !backlog.is_empty()))
}

/// Which of the tasks that a waiter was told of nobody can claim any more.
async fn gone(app: &App, waiter: &Waiter) -> HashSet<TaskId> {
    let mut told: HashSet<_> = waiter.at_hand().into_iter().collect();
    if !told.is_empty() {
        let ids: Vec<_> = told.iter().copied().collect();
        match app.store.push_still_claimable(&ids).await {
            Ok(still) => told.retain(|id| still.claimable.iter().all(|ready| ready.id != *id)),
            // Not known to be gone, so not gone.
            Err(_) => told.clear(),
        }
    }
    told
}

/// Waits for a turn: a crowd of calls must not take all connections of the pool.
async fn turn(turns: &Arc<Semaphore>, wait: Duration) -> Result<OwnedSemaphorePermit, Problem> {
    let turn = timeout(wait, Arc::clone(turns).acquire_owned()).await;
    turn.ok().and_then(Result::ok).ok_or(Problem::Store(StoreError::Busy))
}

async fn routing_of(app: &App, worker_id: &WorkerId) -> Result<Routing, Problem> {
    let _turn = turn(&app.claims, TURN_WAIT).await?;
    let found = app.store.stream_review(std::slice::from_ref(worker_id)).await?;
    found
        .into_iter()
        .find_map(|review| review.routing)
        .ok_or_else(|| Problem::UnknownWorker(worker_id.to_string()))
}

/// One look. In a task of its own: a client that hangs up must not break off a statement half way, and
/// what was claimed for one that has hung up goes back.
pub(super) async fn look(
    app: &App,
    ask: &NextAsk,
    turns: &Arc<Semaphore>,
    wait: Duration,
) -> Result<Vec<ClaimAnswer>, Problem> {
    let turn = turn(turns, wait).await?;
    let (answer, answered) = oneshot::channel();
    let (own_app, own_ask) = (app.clone(), ask.clone());
    tokio::spawn(async move {
        let claimed = own_app.store.task_claim_next(&own_ask).await;
        drop(turn);
        // With a claim_id it waits for the repetition of the call.
        if let Err(Ok(Next::Claimed(claimed))) = answer.send(claimed)
            && own_ask.claim_id.is_none()
        {
            release(&own_app, &own_ask.worker_id, claimed).await;
        }
    });
    let claimed = match answered.await.unwrap_or(Err(StoreError::Busy))? {
        Next::Claimed(claimed) => claimed,
        Next::Spent => return Err(Problem::ClaimIdSpent),
    };
    for claimed in &claimed {
        app.metrics.claim("claimed");
        app.hub.acted(&ask.worker_id, claimed.task.id);
        app.hub.claimed(&ask.worker_id, claimed.task.id, claimed.task.claim_epoch);
    }
    Ok(claimed.into_iter().map(ClaimAnswer::from).collect())
}

async fn release(app: &App, worker_id: &WorkerId, claimed: Vec<Claimed>) {
    for Claimed { task, .. } in claimed {
        let worker_id = worker_id.clone();
        let fence = Fence { task_id: task.id, worker_id, claim_epoch: Some(task.claim_epoch) };
        // The lease ends what cannot be given back.
        let _ = app.store.task_finish(FinishAsk { fence, verb: Verb::Release }).await;
    }
}
