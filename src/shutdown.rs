//! Shutdown in two steps. `Draining`: not ready any more, streams end, requests in flight are
//! finished. `Stopping`: the drain is over or a second signal came; whatever is left is dropped.

use std::future::Future;
use std::time::Duration;

use tokio::sync::watch;

/// How far the shutdown has come; it only moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Serving.
    Running,
    /// Saying goodbye.
    Draining,
    /// Gone, whatever is left.
    Stopping,
}

/// Moves the shutdown forward.
#[derive(Clone, Debug)]
pub struct Trigger(watch::Sender<Stage>);

/// Watches the shutdown.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Receiver<Stage>);

/// A shutdown that has not begun.
#[must_use]
pub fn channel() -> (Trigger, Shutdown) {
    let (sender, receiver) = watch::channel(Stage::Running);
    (Trigger(sender), Shutdown(receiver))
}

impl Trigger {
    /// Moves forward to `stage`; a later stage stays.
    pub fn advance(&self, stage: Stage) {
        self.0.send_if_modified(|now| {
            let moved = *now < stage;
            *now = stage.max(*now);
            moved
        });
    }
}

impl Shutdown {
    /// Whether goodbyes have begun.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        *self.0.borrow() >= Stage::Draining
    }

    /// Whether everything stops.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        *self.0.borrow() >= Stage::Stopping
    }

    /// Resolves once `stage` was reached, also if that was before the call.
    pub async fn reached(&self, stage: Stage) {
        let mut stages = self.0.clone();
        // A dropped trigger counts as the last stage.
        let _ = stages.wait_for(|now| *now >= stage).await;
    }

    /// Runs `work` to its end, or until everything stops: then `None`.
    pub async fn until_stopping<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.reached(Stage::Stopping) => None,
            done = work => Some(done),
        }
    }
}

/// A period with ± 20 % jitter, so that replicas that started together drift apart.
#[must_use]
pub fn jittered(period: Duration) -> Duration {
    period.mul_f64(rand::random_range(0.8..1.2))
}
