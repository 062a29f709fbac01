//! What has become of what streams were told: which outstanding tasks can still be claimed, and how far
//! workers whose calls land on other replicas have read.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::hub::Hub;
use super::router::Router;
use super::stream::Stream;
use crate::domain::{Asked, TaskId, WorkerId};
use crate::shutdown::Shutdown;
use crate::store::{Ready, Store, StoreError, report};

/// How often full windows are asked about, at most.
const SETTLE_EVERY: Duration = Duration::from_millis(250);
/// Outstanding tasks that one round asks about, about.
const SETTLE_TASKS_MAX: usize = 5_000;
/// Tasks, or workers, that one statement asks about.
const LOOKUP_MAX: usize = 1_000;
/// A round of settling may take this share of the time, as one in so many.
const SETTLE_SHARE: u32 = 10;

/// What is not sure any more.
#[derive(Default)]
struct Doubtful {
    /// Announcements to look up.
    asked: HashSet<Ready>,
    /// Those that are to be told again if they can still be claimed.
    repeats: HashSet<Ready>,
    streams: Vec<Arc<Stream>>,
    /// Of these, those that wait until their worker has read more.
    unread: Vec<Arc<Stream>>,
}

/// Asks which outstanding tasks of full windows can still be claimed, and repeats what nobody acted
/// on, until shutdown.
pub async fn run(store: Store, hub: Arc<Hub>, router: Router, shutdown: Shutdown) {
    let mut pause = SETTLE_EVERY;
    let mut turn = 0;
    while shutdown.until_stopping(tokio::time::sleep(pause)).await.is_some() {
        let begun = Instant::now();
        let doubtful = collect(&hub, &mut turn);
        if let Err(error) = settle(&store, &hub, &router, doubtful).await {
            report("could not settle windows", &error);
        }
        pause = SETTLE_EVERY.max(begun.elapsed() * SETTLE_SHARE);
    }
}

/// What is outstanding in windows that are full while more waits, and what is to be repeated; of about
/// so many tasks, beginning with another stream each time.
fn collect(hub: &Hub, turn: &mut usize) -> Doubtful {
    let mut streams = hub.streams();
    if !streams.is_empty() {
        let first = *turn % streams.len();
        streams.rotate_left(first);
    }
    let now = Instant::now();
    let mut doubtful = Doubtful::default();
    for stream in streams {
        if doubtful.asked.len() >= SETTLE_TASKS_MAX || doubtful.unread.len() >= SETTLE_TASKS_MAX {
            break;
        }
        *turn = turn.wrapping_add(1);
        // The net: nobody waits for ever whose turn was missed.
        if stream.wants_more() && stream.mailbox.is_empty() {
            hub.refill_one(stream.connection_id);
        }
        let doubts = stream.doubts(now);
        doubtful.repeats.extend(doubts.repeats);
        if doubts.waits_for_proof {
            doubtful.unread.push(Arc::clone(&stream));
        }
        if !doubts.check.is_empty() || doubts.waits_for_proof {
            doubtful.asked.extend(doubts.check);
            doubtful.streams.push(stream);
        }
    }
    doubtful
}

async fn settle(
    store: &Store,
    hub: &Hub,
    router: &Router,
    doubtful: Doubtful,
) -> Result<(), StoreError> {
    let asked: Vec<TaskId> = doubtful.asked.iter().map(|ready| ready.id).collect();
    let (mut still, mut won) = (HashSet::new(), HashMap::new());
    for ids in asked.chunks(LOOKUP_MAX) {
        let found = store.push_still_claimable(ids).await?;
        still.extend(found.claimable);
        won.extend(found.claimed);
    }
    prove(store, &doubtful.unread).await?;
    // Takes what can no longer be claimed out of the windows; has those read their backlog that have
    // room for it now.
    for stream in &doubtful.streams {
        stream.clear(&doubtful.asked, &still, &won);
        if stream.wants_more() {
            hub.refill_one(stream.connection_id);
        }
    }
    // What came back meanwhile is news to whoever was told of the time before.
    let is_told_again =
        |ready: &&Ready| doubtful.repeats.contains(ready) || !doubtful.asked.contains(ready);
    let again: Vec<_> = still.iter().filter(is_told_again).map(|ready| ready.id).collect();
    if !again.is_empty() {
        router.announce_again(again).await?;
    }
    Ok(())
}

/// What workers asked for in vain, on whatever replica, proves how far they have read; and that they
/// hold no claim, that they may be taken to.
async fn prove(store: &Store, streams: &[Arc<Stream>]) -> Result<(), StoreError> {
    for streams in streams.chunks(LOOKUP_MAX) {
        let workers: Vec<WorkerId> =
            streams.iter().map(|stream| stream.worker_id.clone()).collect();
        let begun = Instant::now();
        let asked = store.push_asked(&workers).await?;
        let claims = store.worker_claims(&workers).await?;
        for stream in streams {
            if let Some((Asked::Task(task), ago)) = asked.get(stream.worker_id.as_str())
                && let Some(asked_at) = begun.checked_sub(*ago)
            {
                stream.prove(*task, asked_at);
            }
            let holds = claims.get(stream.worker_id.as_str()).is_some_and(|c| c.holds_any);
            stream.look_at_claims(begun, holds);
        }
    }
    Ok(())
}
