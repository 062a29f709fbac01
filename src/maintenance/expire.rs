//! Pending tasks whose `expires_at` is over are ended: nobody can claim them any more.

use std::time::Duration;

use super::every;
use crate::shutdown::Shutdown;
use crate::store::Store;

/// How often to look.
const EXPIRE_EVERY: Duration = Duration::from_secs(1);
/// Tasks that one statement ends.
const EXPIRE_TASKS_MAX: u16 = 500;

/// Ends them until shutdown.
pub async fn run(store: Store, shutdown: Shutdown) {
    every("the expiry of tasks failed", EXPIRE_EVERY, shutdown, async || {
        let expired = store.maintain_expire(i64::from(EXPIRE_TASKS_MAX)).await?;
        Ok(expired == u64::from(EXPIRE_TASKS_MAX))
    })
    .await;
}
