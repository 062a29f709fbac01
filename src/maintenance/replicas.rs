//! Replicas that fell silent are buried, and the presence of their streams with them.

use std::time::Duration;

use super::every;
use crate::shutdown::Shutdown;
use crate::store::Store;

/// How often to look.
const BURY_EVERY: Duration = Duration::from_secs(5);

/// Buries until shutdown.
pub async fn run(store: Store, shutdown: Shutdown) {
    every("the burial of silent replicas failed", BURY_EVERY, shutdown, async || {
        let buried = store.replica_leave(None).await?;
        if buried > 0 {
            tracing::warn!(buried, "replicas fell silent; their streams count as ended");
        }
        Ok(false)
    })
    .await;
}
