//! What every test needs: a database, replicas, workers' streams, and patience with a deadline.

pub mod database;
pub mod programs;
pub mod proxy;
pub mod raw;
pub mod replica;
pub mod sse;

use std::future::Future;
use std::time::{Duration, Instant};

pub use database::TestDb;
pub use replica::{Answer, Replica};
pub use sse::SseStream;

/// How long anything may take that is expected to happen. Generous: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `check` gives something.
///
/// # Panics
/// When that does not happen within [`PATIENCE`].
pub async fn eventually<T, Fut>(what: &str, mut check: impl FnMut() -> Fut) -> T
where
    Fut: Future<Output = Option<T>>,
{
    let begun = Instant::now();
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "did not happen within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A plain HTTP client.
pub fn http_client() -> reqwest::ClientBuilder {
    // reqwest asks for a TLS provider also where none is used; a second one is refused, and that
    // is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy()
}
