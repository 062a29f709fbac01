//! The one LISTEN connection of this replica, outside the pool. It only reads and merges.
//!
//! Postgres keeps nothing for a listener that was away. So every connection, the first one too,
//! begins by having everything looked at; and on any trouble the connection is thrown away.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::inbox::{Inbox, Merged};
use crate::domain::ReplicaId;
use crate::metrics::Metrics;
use crate::shutdown::Shutdown;
use crate::store::{Store, StoreError, chain};

/// How often a canary is sent through Postgres.
const CANARY_EVERY: Duration = Duration::from_secs(5);
/// How long it may take to be sent; what is too slow there is the pool, not this connection.
const CANARY_SENT_WITHIN: Duration = Duration::from_secs(4);
/// Within this it must come back, or the connection counts as lost.
const CANARY_BACK_WITHIN: Duration = Duration::from_secs(2);
/// A canary that could not be sent is sent again after this long.
const CANARY_RETRY: Duration = Duration::from_secs(1);
/// A listener that was proven longer ago than this is not ready.
const PROOF_VALID_FOR: Duration = Duration::from_secs(10);
/// Wait before the first reconnect; doubles up to the last.
const RECONNECT_FIRST: Duration = Duration::from_millis(100);
/// Wait before a reconnect, at most. Short: until then only the sweep announces.
const RECONNECT_LAST: Duration = Duration::from_secs(1);

/// When the listener was last proven by a canary.
#[derive(Clone, Debug)]
pub struct Proof(watch::Receiver<Option<Instant>>);

impl Proof {
    /// Whether notifications arrive, to within ten seconds.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.0.borrow().is_some_and(|at| at.elapsed() < PROOF_VALID_FOR)
    }

    /// Waits for the first proof.
    pub async fn first(&mut self) {
        // The sender lives as long as the listener's task; without it nothing will be proven.
        let _ = self.0.wait_for(Option::is_some).await;
    }
}

/// The listener, to be run as a task.
#[derive(Debug)]
pub struct Listener {
    proven: watch::Sender<Option<Instant>>,
}

enum Loss {
    Store(StoreError),
    Ended,
    Canary,
}

impl Listener {
    /// A listener and the view of its proof.
    #[must_use]
    pub fn new() -> (Self, Proof) {
        let (proven, proof) = watch::channel(None);
        (Self { proven }, Proof(proof))
    }

    /// Listens until shutdown, over as many connections as it takes.
    pub async fn run(
        self,
        store: Store,
        inbox: Arc<Inbox>,
        replica: ReplicaId,
        metrics: Arc<Metrics>,
        shutdown: Shutdown,
    ) {
        let mut wait = RECONNECT_FIRST;
        loop {
            let mut was_on = false;
            let life = self.one_life(&store, &inbox, replica, &mut was_on);
            let Some(loss) = shutdown.until_stopping(life).await else {
                return;
            };
            metrics.listener_losses.inc();
            let why = match &loss {
                Loss::Store(error) => chain(error),
                Loss::Ended => "the connection ended".to_owned(),
                Loss::Canary => {
                    format!("a canary did not come back within {} s", CANARY_BACK_WITHIN.as_secs())
                }
            };
            if was_on {
                wait = RECONNECT_FIRST;
            }
            // Said once per loss; that it is still gone is for debugging.
            if was_on {
                tracing::warn!(target: "worker_sse", "listener lost, connecting anew: {why}");
            } else {
                tracing::debug!(target: "worker_sse", "listener still lost: {why}");
            }
            let jitter = rand::random_range(0.5..1.5);
            if shutdown.until_stopping(tokio::time::sleep(wait.mul_f64(jitter))).await.is_none() {
                return;
            }
            wait = (wait * 2).min(RECONNECT_LAST);
        }
    }

    /// One connection's life, from connect to loss.
    async fn one_life(
        &self,
        store: &Store,
        inbox: &Inbox,
        replica: ReplicaId,
        was_on: &mut bool,
    ) -> Loss {
        let mut listener = match store.listen().await {
            Ok(listener) => listener,
            Err(error) => return Loss::Store(error),
        };
        tracing::info!(target: "worker_sse", "listener on: notifications arrive on channel taskwire");
        *was_on = true;
        inbox.add_everything();

        let (came_back, canaries) = watch::channel(0_u64);
        let reading = async {
            loop {
                let payload = match listener.next().await {
                    Ok(Some(payload)) => payload,
                    Ok(None) => return Loss::Ended,
                    Err(error) => return Loss::Store(error),
                };
                match inbox.merge(&payload) {
                    Merged::Hint => {}
                    Merged::Canary(text) => {
                        if let Some((whose, n)) = text.split_once(' ')
                            && whose == replica.to_string()
                            && let Ok(n) = n.parse()
                        {
                            came_back.send_replace(n);
                        }
                    }
                    Merged::Unreadable => {
                        tracing::debug!(target: "worker_sse", "ignored a foreign notification");
                    }
                }
            }
        };
        let canary = self.send_canaries(store, replica, canaries);
        tokio::select! {
            loss = reading => loss,
            loss = canary => loss,
        }
    }

    /// Proves the connection again and again; returns when a canary is lost.
    async fn send_canaries(
        &self,
        store: &Store,
        replica: ReplicaId,
        mut canaries: watch::Receiver<u64>,
    ) -> Loss {
        for n in 1_u64.. {
            let canary = format!("canary {replica} {n}");
            let sent = store.notify_canary(&canary);
            match tokio::time::timeout(CANARY_SENT_WITHIN, sent).await {
                Ok(Ok(())) => {
                    let back = canaries.wait_for(|seen| *seen >= n);
                    if tokio::time::timeout(CANARY_BACK_WITHIN, back).await.is_err() {
                        return Loss::Canary;
                    }
                    self.proven.send_replace(Some(Instant::now()));
                    tokio::time::sleep(CANARY_EVERY).await;
                }
                // Postgres is away, or the pool busy: that is not this connection's fault. Whether it
                // lives shows when a canary can be sent again.
                Ok(Err(_)) | Err(_) => tokio::time::sleep(CANARY_RETRY).await,
            }
        }
        Loss::Ended
    }
}
