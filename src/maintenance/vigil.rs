//! Tells when Postgres is not as safe as it was promised to be, and when it is again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::every;
use crate::metrics::Metrics;
use crate::shutdown::Shutdown;
use crate::store::{Condition, Danger, Store};

/// How often to look: what begins is told within 10 s.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// Looks until shutdown.
pub async fn run(store: Store, metrics: Arc<Metrics>, shutdown: Shutdown) {
    let last = Mutex::new(Last::default());
    every("could not ask Postgres how it is", LOOK_EVERY, shutdown, async || {
        let condition = store.condition().await?;
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        last.tell(&condition, &metrics);
        // Each connection has the setting of its beginning, and leads where the primary was then.
        if last.is_other_setting(condition.synchronous_commit)
            || condition.dangers.iter().any(Danger::may_be_elsewhere)
        {
            store.renew_connections();
        }
        Ok(false)
    })
    .await;
}

/// What was found last.
#[derive(Default)]
struct Last {
    dangers: BTreeMap<&'static str, String>,
    synchronous_commit: Option<String>,
}

impl Last {
    /// Logs what has begun and what has ended.
    fn tell(&mut self, condition: &Condition, metrics: &Metrics) {
        let now = condition.dangers.iter().map(|danger| (danger.code(), danger.to_string()));
        let now: BTreeMap<_, _> = now.collect();
        for (code, danger) in &now {
            if !self.dangers.contains_key(code) {
                tracing::warn!("not safe: {danger}");
                metrics.danger(code, true);
            }
        }
        for (code, danger) in &self.dangers {
            if !now.contains_key(code) {
                tracing::info!("safe again, this has ended: {danger}");
                metrics.danger(code, false);
            }
        }
        self.dangers = now;
        metrics.notification_queue_usage.set(condition.queue_usage);
    }

    fn is_other_setting(&mut self, synchronous_commit: String) -> bool {
        let before = self.synchronous_commit.replace(synchronous_commit);
        before.is_some() && before != self.synchronous_commit
    }
}
