//! Finished tasks are forgotten after the retention.

use std::time::Duration;

use super::every;
use crate::shutdown::Shutdown;
use crate::store::Store;

/// How often to look.
const PRUNE_EVERY: Duration = Duration::from_mins(1);
/// Tasks that one statement forgets: few, so that no lock is held long.
const PRUNE_TASKS_MAX: u16 = 500;

/// Prunes until shutdown.
pub async fn run(store: Store, retention_days: i32, shutdown: Shutdown) {
    every("the pruning of finished tasks failed", PRUNE_EVERY, shutdown, async || {
        let pruned = store.maintain_prune(i64::from(PRUNE_TASKS_MAX), retention_days).await?;
        if pruned > 0 {
            tracing::info!(pruned, retention_days, "finished tasks were pruned");
        }
        Ok(pruned == u64::from(PRUNE_TASKS_MAX))
    })
    .await;
}
