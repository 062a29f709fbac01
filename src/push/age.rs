//! Streams end at a certain age (protocol S4, `max_age`), so that load spreads over the replicas again
//! after a deploy. It must cost no worker a claim: one that sits in its handler does not read that its
//! stream has ended, and its claim would lapse a lease later. So a stream ends only when its worker is
//! seen to hold no claim for a while, and is told nothing new meanwhile; and not while it may wait for
//! whatever is best, as that call would give it a claim without its reading the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::doubts::ASKED_LATELY;
use super::frames::End;
use super::hub::Hub;
use super::stream::Stream;
use crate::shutdown::Shutdown;
use crate::store::{Store, StoreError, report};

/// How often to look. For so long a stream is told nothing before its end: claims of what it was told just
/// before are in Postgres by then.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Streams that are looked at, and of which so many end in such a time, at most: their workers come
/// back, and not all at once.
const AGED_STREAMS_MAX: usize = 50;

/// Ends streams that are old enough, until shutdown.
pub async fn run(store: Store, hub: Arc<Hub>, shutdown: Shutdown) {
    let mut aged = Vec::new();
    while shutdown.until_stopping(tokio::time::sleep(LOOK_EVERY)).await.is_some() {
        // Those that are being looked at stay, until they have ended or go on.
        let now = Instant::now();
        aged.retain(|stream: &Arc<Stream>| stream.aged_since(now).is_some() && hub.has(stream));
        fill_up(&hub, &mut aged);
        if let Err(error) = look(&store, &hub, &aged).await {
            report("could not end streams of a certain age, will try again", &error);
            for stream in &aged {
                go_on(&hub, stream);
            }
        }
    }
}

/// Adds the oldest of those that are old enough.
fn fill_up(hub: &Hub, aged: &mut Vec<Arc<Stream>>) {
    let now = Instant::now();
    let mut more: Vec<_> = hub
        .streams()
        .into_iter()
        .filter_map(|stream| Some((stream.aged_since(now)?, stream)))
        .filter(|(_, stream)| !aged.iter().any(|other| Arc::ptr_eq(other, stream)))
        .collect();
    more.sort_by_key(|(since, _)| *since);
    let room = AGED_STREAMS_MAX.saturating_sub(aged.len());
    aged.extend(more.into_iter().take(room).map(|(_, stream)| stream));
}

async fn look(store: &Store, hub: &Hub, aged: &[Arc<Stream>]) -> Result<(), StoreError> {
    if aged.is_empty() {
        return Ok(());
    }
    let workers: Vec<_> = aged.iter().map(|stream| stream.worker_id.clone()).collect();
    let began = Instant::now();
    let claims = store.worker_claims(&workers).await?;
    for stream in aged {
        let of_worker = claims.get(stream.worker_id.as_str());
        let holds = of_worker.is_some_and(|claims| claims.holds_any);
        let asked =
            of_worker.and_then(|claims| claims.asked_ago).is_some_and(|ago| ago < ASKED_LATELY);
        stream.look_at_claims(began, holds || asked);
        if holds || asked || stream.has_asked_lately(began) {
            go_on(hub, stream);
        } else if stream.is_retiring() {
            tracing::debug!(target: "worker_sse", worker_id = %stream.worker_id, "its stream has reached its age");
            hub.end(stream, End::MaxAge);
        } else if stream.rests(began) {
            stream.retire();
        }
    }
    Ok(())
}

fn go_on(hub: &Hub, stream: &Stream) {
    stream.go_on();
    hub.refill_one(stream.connection_id);
}
