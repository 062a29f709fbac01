//! What no hint told: the net under the notifications (protocol S6).

use std::sync::Arc;
use std::time::Duration;

use super::hub::Hub;
use super::inbox::Inbox;
use super::router::Router;
use crate::shutdown::{Shutdown, jittered};
use crate::store::{Store, StoreError, report};

/// About how often a replica looks for what became claimable unannounced; with jitter, under 2 s.
const SWEEP_EVERY: Duration = Duration::from_millis(1_500);
/// New tasks that one sweep names; with more, every backlog is read again.
const SWEEP_TASKS_MAX: usize = 2_000;
/// Codebases that one sweep names when there are more tasks; with more, every backlog is read again.
const SWEEP_CODEBASES_MAX: usize = 200;
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
