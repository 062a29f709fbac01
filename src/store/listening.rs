//! One connection that listens. It is to be thrown away on any trouble: the driver would reconnect by
//! itself, but then not every gap is visible from outside.

use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};

use super::StoreError;

/// How long a connection may take to be made and to listen.
const LISTEN_WAIT: Duration = Duration::from_secs(5);

/// What listens on one channel.
#[derive(Debug)]
pub struct Listening(Option<PgListener>);

impl Listening {
    pub(super) async fn start(
        options: &PgConnectOptions,
        channel: &str,
    ) -> Result<Self, StoreError> {
        let own = PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(LISTEN_WAIT)
            // It lives until something happens to it.
            .max_lifetime(None)
            .idle_timeout(None)
            .connect_lazy_with(options.clone());
        // From here on it is dropped for good, also when LISTEN is never answered.
        let mut listening = Self(Some(PgListener::connect_with(&own).await?));
        if let Some(listener) = &mut listening.0 {
            listener.ignore_pool_close_event(true);
            listener.eager_reconnect(false);
            tokio::time::timeout(LISTEN_WAIT, listener.listen(channel))
                .await
                .map_err(|_| StoreError::timed_out())??;
        }
        Ok(listening)
    }

    /// The payload of the next notification. `None`: the connection ended.
    pub async fn next(&mut self) -> Result<Option<String>, StoreError> {
        let Some(listener) = &mut self.0 else {
            return Ok(None);
        };
        Ok(listener.try_recv().await?.map(|notification| notification.payload().to_owned()))
    }
}

impl Drop for Listening {
    /// Closes the socket at once. Left to itself, the driver sends UNLISTEN first and waits for the
    /// answer: on a dead link for a quarter of an hour, and so long Postgres would keep, for a listener
    /// that does not read, all that is announced.
    fn drop(&mut self) {
        let listener = self.0.take();
        // The driver spawns its goodbye: into a runtime that never runs it, and drops it with all it has.
        let Ok(nowhere) = tokio::runtime::Builder::new_current_thread().build() else {
            return;
        };
        let inside = nowhere.enter();
        drop(listener);
        drop(inside);
        nowhere.shutdown_background();
    }
}
