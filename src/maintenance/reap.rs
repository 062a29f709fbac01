//! Claims whose lease has lapsed: kept for owners that live, given back otherwise.

use std::sync::Arc;
use std::time::Duration;

use super::every;
use crate::domain::ReplicaId;
use crate::metrics::Metrics;
use crate::shutdown::Shutdown;
use crate::store::{Reaped, Store};

/// How often to look.
const REAP_EVERY: Duration = Duration::from_secs(1);
/// Claims that one statement looks at.
const REAP_TASKS_MAX: u16 = 500;

/// Reaps until shutdown.
pub async fn run(store: Store, replica: ReplicaId, metrics: Arc<Metrics>, shutdown: Shutdown) {
    every("the reaping of claims failed", REAP_EVERY, shutdown, async || {
        let reaped = store.maintain_reap(i64::from(REAP_TASKS_MAX), replica).await?;
        let Reaped { kept, pending, failed, cancelled } = reaped;
        metrics.reaped("kept", kept);
        metrics.reaped("pending", pending);
        metrics.reaped("failed", failed);
        metrics.reaped("cancelled", cancelled);
        if pending + failed + cancelled > 0 {
            tracing::info!(pending, failed, cancelled, "claims of silent workers were ended");
        }
        Ok(kept + pending + failed + cancelled == u64::from(REAP_TASKS_MAX))
    })
    .await;
}
