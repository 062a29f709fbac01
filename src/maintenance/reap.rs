//! Claims whose lease has run out: kept for owners that live, ended otherwise, or when they take too long.

use std::sync::Arc;
use std::time::Duration;

use super::every;
use crate::metrics::Metrics;
use crate::shutdown::Shutdown;
use crate::store::{Reaped, Store};

/// How often to look.
const REAP_EVERY: Duration = Duration::from_secs(1);
/// Claims that one statement looks at.
const REAP_TASKS_MAX: u16 = 500;

/// Reaps until shutdown.
pub async fn run(store: Store, metrics: Arc<Metrics>, shutdown: Shutdown) {
    every("the reaping of claims failed", REAP_EVERY, shutdown, async || {
        let reaped = store.maintain_reap(i64::from(REAP_TASKS_MAX)).await?;
        let Reaped { kept, lapsed, timed_out } = reaped;
        metrics.reaped("kept", kept);
        metrics.reaped("lapsed", lapsed);
        metrics.reaped("timed_out", timed_out);
        if lapsed + timed_out > 0 {
            tracing::info!(lapsed, timed_out, "claims were ended");
        }
        Ok(kept + lapsed + timed_out == u64::from(REAP_TASKS_MAX))
    })
    .await;
}
