//! What no hint told: the net under the notifications (protocol S6).

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::hub::Hub;
use super::inbox::Inbox;
use super::router::Router;
use crate::domain::TaskId;
use crate::shutdown::{Shutdown, jittered};
use crate::store::{Ready, Store, StoreError, report};

/// About how often a replica looks for what became claimable unannounced; with jitter, under 2 s.
const SWEEP_EVERY: Duration = Duration::from_millis(1_500);
/// New tasks that one sweep names; with more, every backlog is read again.
const SWEEP_TASKS_MAX: usize = 2_000;
/// Codebases that one sweep names when there are more tasks; with more, every backlog is read again.
const SWEEP_CODEBASES_MAX: usize = 200;
/// How often full windows are asked about, at most.
const SETTLE_EVERY: Duration = Duration::from_millis(250);
/// Outstanding tasks that one round asks about, about.
const SETTLE_TASKS_MAX: usize = 5_000;
/// A round of settling may take this share of the time, as one in so many.
const SETTLE_SHARE: u32 = 10;

/// Finds what became claimable since the last look, until shutdown. Its cost is that of the new
/// tasks, not of the backlog.
pub async fn run(
    store: Store,
    hub: Arc<Hub>,
    inbox: Arc<Inbox>,
    router: Router,
    shutdown: Shutdown,
) {
    let mut snapshot = None;
    loop {
        if let Err(error) = sweep(&store, &hub, &inbox, &router, &mut snapshot).await {
            report("the sweep failed", &error);
        }
        let pause = tokio::time::sleep(jittered(SWEEP_EVERY));
        if shutdown.until_stopping(pause).await.is_none() {
            return;
        }
    }
}

async fn sweep(
    store: &Store,
    hub: &Hub,
    inbox: &Inbox,
    router: &Router,
    snapshot: &mut Option<String>,
) -> Result<(), StoreError> {
    let Some(last) = snapshot.clone() else {
        // Streams read their backlog when they open: the first sweep only marks where to begin.
        *snapshot = Some(store.push_snapshot().await?);
        inbox.add_all_codebases();
        return Ok(());
    };
    let limit = i64::try_from(SWEEP_TASKS_MAX).unwrap_or(i64::MAX);
    let (ready, next) = store.push_ready_since(&last, limit).await?;
    *snapshot = Some(next);
    if hub.is_idle() {
        return Ok(());
    }
    if ready.len() == SWEEP_TASKS_MAX {
        let most = i64::try_from(SWEEP_CODEBASES_MAX).unwrap_or(i64::MAX);
        let codebases = store.push_ready_codebases(&last, most).await?;
        if codebases.len() == SWEEP_CODEBASES_MAX {
            inbox.add_all_codebases();
        } else {
            inbox.add_codebases(codebases);
        }
    } else {
        let news = router.news(&ready);
        if !news.is_empty() {
            tracing::debug!(target: "worker_sse", tasks = news.len(), "sweep found tasks that no notification told");
            inbox.add_tasks(news);
        }
    }
    Ok(())
}

/// Asks which outstanding tasks of full windows can still be claimed, and repeats what nobody acted
/// on, until shutdown.
pub async fn settle(store: Store, hub: Arc<Hub>, router: Router, shutdown: Shutdown) {
    let mut pause = SETTLE_EVERY;
    while shutdown.until_stopping(tokio::time::sleep(pause)).await.is_some() {
        let begun = tokio::time::Instant::now();
        if let Err(error) = settle_once(&store, &hub, &router).await {
            report("could not settle windows", &error);
        }
        pause = SETTLE_EVERY.max(begun.elapsed() * SETTLE_SHARE);
    }
}

async fn settle_once(store: &Store, hub: &Hub, router: &Router) -> Result<(), StoreError> {
    let doubtful = hub.doubtful(SETTLE_TASKS_MAX);
    if doubtful.asked.is_empty() {
        return Ok(());
    }
    let asked: Vec<TaskId> = doubtful.asked.iter().map(|ready| ready.id).collect();
    let mut still = HashSet::new();
    for ids in asked.chunks(1_000) {
        still.extend(store.push_still_claimable(ids).await?);
    }
    hub.settle(&doubtful, &still);
    // What came back meanwhile is news to whoever was told of the time before.
    let is_told_again =
        |ready: &&Ready| doubtful.repeats.contains(ready) || !doubtful.asked.contains(ready);
    let again: Vec<_> = still.iter().filter(is_told_again).map(|ready| ready.id).collect();
    if !again.is_empty() {
        router.announce(again).await?;
    }
    Ok(())
}
