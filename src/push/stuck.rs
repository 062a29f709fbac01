//! Readers that are stuck while their connection lives, as over HTTP/2: nothing is taken from their mailbox
//! (protocol S8). They end here; a socket that takes no bytes is noticed where it is written to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::frames::End;
use super::hub::Hub;
use crate::shutdown::Shutdown;

/// How long a mailbox may wait without anything being taken from it.
const STUCK_FOR_MAX: Duration = Duration::from_secs(20);
/// How often to look.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Ends streams that take nothing, until shutdown.
pub async fn run(hub: Arc<Hub>, shutdown: Shutdown) {
    while shutdown.until_stopping(tokio::time::sleep(LOOK_EVERY)).await.is_some() {
        let now = Instant::now();
        for stream in hub.streams() {
            if stream.stuck_for(now) >= STUCK_FOR_MAX {
                tracing::info!(
                    target: "worker_sse", worker_id = %stream.worker_id,
                    connection_id = %stream.connection_id, "stream ended: too_slow"
                );
                hub.end(&stream, End::TooSlow);
            }
        }
    }
}
