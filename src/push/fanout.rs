//! `WORKER_SSE_FANOUT=k` (protocol R4): a task is offered to k workers first, and to more while it stays
//! unclaimed. A herd of workers that all hear of each task would all try to claim it.
//!
//! Only announcements of what has just become claimable begin so. A stream that reads its backlog sees all
//! that it could claim, whoever was offered it first. The replicas share k by a lot that each draws alike
//! (`domain::fanout`); who knows less of the others offers too many, and that is harmless. What is noted here
//! may be lost: other replicas widen what they offered, and streams that come back read their backlog.
//!
//! ```text
//!   0 s     k workers, those that seem idle
//!   0.3 s   2 k in all, if it is still unclaimed; at once when one of them has left
//!   0.6 s   4 k …
//!   1.8 s   all
//! ```

use std::sync::Arc;
use std::time::Duration;

use rand::seq::SliceRandom;

use super::announcement::Announcement;
use super::hub::Hub;
use super::narrow::{Due, First, LOOKUP_MAX};
use super::router::Router;
use super::stream::{Rank, Stream};
use crate::domain::ReplicaId;
use crate::domain::routing::is_for_all;
use crate::shutdown::Shutdown;
use crate::store::{Store, StoreError, report};

/// How often to look which are due, at most: those of one look share a statement.
const LOOK_AFTER: Duration = Duration::from_millis(50);
/// Wait after Postgres did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(250);
/// Streams that are compared for each one that is chosen.
const COMPARED: usize = 4;
/// And besides those.
const COMPARED_BESIDES: usize = 8;
/// Streams that are compared at most while there are some that match; many of them may be busy.
const COMPARED_MAX: usize = 512;
/// How often to ask who works on something, and where the streams of this replica stand.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Streams that one such statement asks about.
const ASKED_STREAMS_MAX: usize = 1_000;

impl Hub {
    /// Offers a task to few streams first. False: it is to be offered to all at once.
    pub(super) fn offer_to_few(&self, task: &Announcement) -> bool {
        // Nobody else could take what is for one worker.
        if task.push.task.target_worker_id.is_some() {
            return false;
        }
        let count = match self.narrow.begin(task.ready()) {
            First::ToAll => return false,
            First::Known => return true,
            First::Few(count) => count,
        };
        let share = self.narrow.share(count, task.ready());
        let (told, is_all) = if share == 0 {
            self.offer_in_doubt(task, count)
        } else {
            self.offer_to_best(task, share)
        };
        self.metrics.fanout("narrow");
        self.narrow.note(task.ready(), told, is_all);
        true
    }

    /// Offers it to twice as many as before, or to all in the end.
    pub(super) fn offer_to_more(&self, task: &Announcement) {
        let Some((count, told)) = self.narrow.widen(task.ready()) else {
            self.metrics.fanout("all");
            return self.offer_to_all(&[task]);
        };
        let share = self.narrow.share(count, task.ready()).saturating_sub(told);
        let (told, is_all) = self.offer_to_best(task, share);
        self.metrics.fanout("widened");
        self.narrow.note(task.ready(), told, is_all);
    }

    /// No offer falls to this replica. But the lot is drawn among all streams, and where few match here, or not
    /// all streams do, those of the others may not match at all: so one of them is told.
    fn offer_in_doubt(&self, task: &Announcement, count: u32) -> (u32, bool) {
        let (ranked, is_all) = self.compare(task, usize::try_from(count).unwrap_or(usize::MAX));
        let is_few = is_all && ranked.len() <= usize::try_from(count).unwrap_or(usize::MAX);
        let is_in_doubt = is_few || !is_for_all(&task.push.task.codebase_id);
        if is_in_doubt { (self.offer_in_order(task, ranked, 1), false) } else { (0, false) }
    }

    /// Offers a task to so many streams, best first. How many were told, and whether all here were asked.
    fn offer_to_best(&self, task: &Announcement, count: u32) -> (u32, bool) {
        if count == 0 {
            return (0, false);
        }
        let enough = usize::try_from(count).unwrap_or(usize::MAX);
        let enough = enough.saturating_mul(COMPARED).saturating_add(COMPARED_BESIDES);
        let (ranked, is_all) = self.compare(task, enough);
        let told = self.offer_in_order(task, ranked, count);
        (told, is_all && told < count)
    }

    fn offer_in_order(
        &self,
        task: &Announcement,
        mut ranked: Vec<(Rank, Arc<Stream>)>,
        count: u32,
    ) -> u32 {
        // Of those who are as good as each other, anyone.
        ranked.shuffle(&mut rand::rng());
        ranked.sort_by_key(|(rank, _)| *rank);
        let now = std::time::Instant::now();
        let mut told = 0;
        for (_, stream) in ranked {
            if told == count {
                break;
            }
            told += u32::from(self.offer(&stream, &[task], now) == 1);
        }
        self.count_announcements(usize::try_from(told).unwrap_or(usize::MAX));
        told
    }

    /// Ranks streams that would take a task, until enough of them seem idle; and whether these are all.
    fn compare(&self, task: &Announcement, enough: usize) -> (Vec<(Rank, Arc<Stream>)>, bool) {
        let begin = usize::try_from(rand::random::<u32>()).unwrap_or_default();
        let (mut ranked, mut idle) = (Vec::new(), 0);
        let (mut seen, mut count) = (0, enough);
        loop {
            let (all, some) = self.some_concerned(task, begin + seen, count);
            // A last round that is too long comes to the first ones again.
            let some = some.into_iter().take(all.saturating_sub(seen));
            for stream in some {
                seen += 1;
                if let Some(rank) = stream.rank(task) {
                    idle += usize::from(!rank.is_full && !rank.is_busy);
                    ranked.push((rank, stream));
                }
            }
            if seen >= all {
                return (ranked, true);
            }
            if idle >= enough || ranked.len() >= enough.max(COMPARED_MAX) {
                return (ranked, false);
            }
            count = count.saturating_mul(2);
        }
    }
}

/// Widens what stays unclaimed, until shutdown.
pub async fn run(
    store: Store,
    hub: Arc<Hub>,
    router: Router,
    replica: ReplicaId,
    shutdown: Shutdown,
) {
    let widen = async {
        while let Some(due) = shutdown.until_stopping(hub.narrow.due()).await {
            let pause = match widen(&store, &router, &due).await {
                Ok(()) => {
                    hub.narrow.forget(&due);
                    // More than one statement asks about wait already.
                    if due.len() == LOOKUP_MAX { Duration::ZERO } else { LOOK_AFTER }
                }
                Err(error) => {
                    report("could not look up what was offered to few", &error);
                    hub.narrow.again(due);
                    RETRY_AFTER
                }
            };
            tokio::time::sleep(pause).await;
        }
    };
    let ask = async {
        let mut turn = 0;
        loop {
            if let Err(error) = ask(&store, &hub, replica, &mut turn).await {
                report("could not ask who is busy", &error);
            }
            if shutdown.until_stopping(tokio::time::sleep(ASK_EVERY)).await.is_none() {
                return;
            }
        }
    };
    tokio::join!(widen, ask);
}

async fn widen(store: &Store, router: &Router, due: &[Due]) -> Result<(), StoreError> {
    let ids: Vec<_> = due.iter().map(|due| due.ready.id).collect();
    let still = store.push_still_claimable(&ids).await?;
    let claimable: Vec<_> = still.claimable.iter().map(|ready| ready.id).collect();
    router.widen(&claimable).await
}

/// Asks Postgres where this replica's streams stand, and which of some workers hold a claim; of others each
/// time.
async fn ask(
    store: &Store,
    hub: &Hub,
    replica: ReplicaId,
    turn: &mut usize,
) -> Result<(), StoreError> {
    let place = store.replica_place(replica).await?;
    hub.narrow.stand(place);
    let mut streams = hub.streams();
    if streams.is_empty() {
        return Ok(());
    }
    streams.sort_unstable_by_key(|stream| stream.connection_id);
    let first = *turn % streams.len();
    streams.rotate_left(first);
    streams.truncate(ASKED_STREAMS_MAX);
    *turn = first + streams.len();
    let workers: Vec<_> = streams.iter().map(|stream| stream.worker_id.clone()).collect();
    let claims = store.worker_claims(&workers).await?;
    for stream in streams {
        let claims = claims.get(stream.worker_id.as_str());
        stream.note_busy(claims.is_some_and(|claims| claims.holds_any));
    }
    Ok(())
}
