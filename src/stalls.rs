//! Notices when this process stood still: stopped, out of CPU, or with a thread that somebody blocks. Clients
//! see late answers then, and the log should say whose fault that was not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::metrics::Metrics;
use crate::shutdown::Shutdown;

/// How often to look at the clock.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A look that comes later than this is worth a line.
const STALL_MIN: Duration = Duration::from_secs(1);

/// Looks until shutdown.
pub async fn run(metrics: Arc<Metrics>, shutdown: Shutdown) {
    let mut looked = Instant::now();
    while shutdown.until_stopping(tokio::time::sleep(LOOK_EVERY)).await.is_some() {
        let late = looked.elapsed().saturating_sub(LOOK_EVERY);
        if late >= STALL_MIN {
            metrics.stalls.inc();
            tracing::warn!(
                "this process stood still for {:.1} s: it was stopped, or there was no CPU for it",
                late.as_secs_f64()
            );
        }
        looked = Instant::now();
    }
}
