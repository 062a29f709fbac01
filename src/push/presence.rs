//! The rows that say who is connected here: one heartbeat vouches for all streams of the replica.

use std::sync::Arc;
use std::time::Duration;

use super::hub::Hub;
use crate::domain::ReplicaId;
use crate::shutdown::{Shutdown, jittered};
use crate::store::{Store, StoreError, chain, report};

/// How often the replica shows that it lives: the leases of the claims of its streams hang on it.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(1);
/// Wait after Postgres did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Shows that the replica lives, until shutdown. When the others had buried it in the meantime, its
/// streams get their rows back.
pub async fn heartbeat(
    store: Store,
    hub: Arc<Hub>,
    replica: ReplicaId,
    address: String,
    shutdown: Shutdown,
) {
    let mut is_away = false;
    loop {
        let beaten = beat(&store, &hub, replica, &address).await;
        if is_away && beaten.is_ok() {
            tracing::info!("Postgres is back");
        }
        let pause = match &beaten {
            Ok(()) => jittered(HEARTBEAT_EVERY),
            Err(error) if error.is_passing() && !is_away => {
                tracing::warn!(
                    "Postgres is away: writes are answered 503, streams stay open: {}",
                    chain(error)
                );
                RETRY_AFTER
            }
            Err(error) => {
                report("the replica's heartbeat failed", error);
                RETRY_AFTER
            }
        };
        is_away = beaten.is_err_and(|error| error.is_passing());
        if shutdown.until_stopping(tokio::time::sleep(pause)).await.is_none() {
            return;
        }
    }
}

async fn beat(
    store: &Store,
    hub: &Hub,
    replica: ReplicaId,
    address: &str,
) -> Result<(), StoreError> {
    if store.replica_heartbeat(replica, address).await? && !hub.is_empty() {
        tracing::warn!(
            target: "worker_sse", streams = hub.len(),
            "the other replicas had given this one up; it is back"
        );
        hub.review_all();
    }
    Ok(())
}

/// Ends the presence of streams that ended, many in one statement, until shutdown.
pub async fn departures(store: Store, hub: Arc<Hub>, shutdown: Shutdown) {
    while let Some(departed) = shutdown.until_stopping(hub.departed()).await {
        if let Err(error) = store.stream_close(&departed).await {
            report("could not end the presence of streams, will try again", &error);
            hub.depart(departed);
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }
}
