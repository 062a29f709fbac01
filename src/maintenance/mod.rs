//! What keeps the tables true without anyone asking: one file per duty. Every replica does all of
//! them, and there is no leader: each is a guarded statement that skips what another is at.

pub mod expire;
pub mod promote;
pub mod prune;
pub mod reap;
pub mod replicas;
pub mod seen;
pub mod vigil;

use std::future::Future;
use std::time::Duration;

use crate::shutdown::{Shutdown, jittered};
use crate::store::{StoreError, report};

/// The one shape of every duty: run, again at once while there is more, wait with jitter.
///
/// `duty` returns whether it left something for the next round; `failed` is what the log says of one
/// that failed.
pub(crate) async fn every<F, Fut>(
    failed: &'static str,
    period: Duration,
    shutdown: Shutdown,
    mut duty: F,
) where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<bool, StoreError>>,
{
    loop {
        match duty().await {
            Ok(true) if !shutdown.is_draining() => continue,
            Ok(_) => {}
            // The next round is the retry.
            Err(error) => report(failed, &error),
        }
        if shutdown.until_stopping(tokio::time::sleep(jittered(period))).await.is_none() {
            return;
        }
    }
}
