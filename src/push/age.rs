//! Streams end at a certain age (protocol S4, `max_age`), so that load spreads over the replicas again
//! after a deploy. It must cost no worker a claim: one that sits in its handler does not read that its
//! stream has ended, and its claim would lapse a lease later. So a stream ends only when its worker
//! holds no claim, and there is nothing that it was told of and may come to claim yet.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::frames::End;
use super::hub::Hub;
use super::stream::Stream;
use crate::shutdown::Shutdown;
use crate::store::{Store, StoreError, report};

/// How long a stream is told nothing before it is looked at: claims of what it was told just before are
/// in Postgres by then.
const QUIET: Duration = Duration::from_secs(1);
/// Streams that a replica ends in such a time, at most: their workers come back, and not all at once.
const AGED_STREAMS_MAX: usize = 50;
/// Tasks that one statement asks about.
const LOOKUP_MAX: usize = 1_000;

/// Ends streams that are old enough, until shutdown.
pub async fn run(store: Store, hub: Arc<Hub>, shutdown: Shutdown) {
    let mut retiring: Vec<Arc<Stream>> = Vec::new();
    while shutdown.until_stopping(tokio::time::sleep(QUIET)).await.is_some() {
        if let Err(error) = end_idle(&store, &hub, &retiring).await {
            report("could not end streams of a certain age, will try again", &error);
            go_on(&hub, &retiring);
        }
        retiring = choose(&hub);
    }
}

/// The next ones, which hear of nothing from now on.
fn choose(hub: &Hub) -> Vec<Arc<Stream>> {
    let now = Instant::now();
    let aged = hub.streams().into_iter().filter(|stream| stream.is_aged(now));
    let aged: Vec<_> = aged.take(AGED_STREAMS_MAX).collect();
    for stream in &aged {
        stream.retire();
    }
    aged
}

async fn end_idle(store: &Store, hub: &Hub, streams: &[Arc<Stream>]) -> Result<(), StoreError> {
    if streams.is_empty() {
        return Ok(());
    }
    let workers: Vec<_> = streams.iter().map(|stream| stream.worker_id.clone()).collect();
    let tasks: HashSet<_> = streams.iter().flat_map(|stream| stream.may_act_on()).collect();
    let tasks: Vec<_> = tasks.into_iter().collect();
    let mut claimable = HashSet::new();
    for tasks in tasks.chunks(LOOKUP_MAX) {
        let still = store.push_still_claimable(tasks).await?;
        claimable.extend(still.claimable.into_iter().map(|ready| ready.id));
    }
    // After the tasks: what was claimed in between is found here.
    let holding = store.worker_holding(&workers).await?;
    for stream in streams {
        let may_claim = stream.may_act_on().iter().any(|task| claimable.contains(task));
        if may_claim || holding.contains(stream.worker_id.as_str()) {
            go_on(hub, std::slice::from_ref(stream));
        } else {
            tracing::debug!(target: "worker_sse", worker_id = %stream.worker_id, "its stream has reached its age");
            hub.end(stream, End::MaxAge);
        }
    }
    Ok(())
}

fn go_on(hub: &Hub, streams: &[Arc<Stream>]) {
    for stream in streams {
        stream.go_on();
        hub.refill_one(stream.connection_id);
    }
}
