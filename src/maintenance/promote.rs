//! Scheduled tasks whose `run_at` has come can be claimed from now on.

use std::time::Duration;

use super::every;
use crate::shutdown::Shutdown;
use crate::store::Store;

/// How often to look: a task is announced within a second of becoming due.
const PROMOTE_EVERY: Duration = Duration::from_millis(500);
/// Tasks that one statement promotes.
const PROMOTE_TASKS_MAX: u16 = 500;

/// Promotes until shutdown.
pub async fn run(store: Store, shutdown: Shutdown) {
    every("the promotion of scheduled tasks failed", PROMOTE_EVERY, shutdown, async || {
        let promoted = store.maintain_promote(i64::from(PROMOTE_TASKS_MAX)).await?;
        Ok(promoted == u64::from(PROMOTE_TASKS_MAX))
    })
    .await;
}
