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

/// A table that has grown by this factor is not the one that statements were planned for. While there are few
/// rows Postgres plans to read them all, and keeps to that: a plan is made once for each connection, and its own
/// statistics may come minutes after the rows.
const OUTGROWN: i64 = 4;
/// A table that is smaller is read at once, however that is planned.
const SMALL_BYTES: i64 = 64 * 1024;

/// Looks until shutdown.
pub async fn run(store: Store, metrics: Arc<Metrics>, shutdown: Shutdown) {
    let last = Mutex::new(Last::default());
    every("could not ask Postgres how it is", LOOK_EVERY, shutdown, async || {
        let condition = store.condition().await?;
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        last.tell(&condition, &metrics);
        // Each connection has the setting and the plans of its beginning, and leads where the primary was then.
        if last.is_other_setting(condition.synchronous_commit)
            | last.has_outgrown_plans(&condition.table_bytes)
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
    /// Sizes of tables when the oldest plans were made.
    planned_bytes: Vec<i64>,
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

    fn has_outgrown_plans(&mut self, table_bytes: &[i64]) -> bool {
        let is_outgrown =
            |(now, planned): (&i64, &i64)| *now > (*planned).max(SMALL_BYTES) * OUTGROWN;
        let has = table_bytes.iter().zip(&self.planned_bytes).any(is_outgrown);
        if has || self.planned_bytes.is_empty() {
            table_bytes.clone_into(&mut self.planned_bytes);
        }
        has
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_outgrown_when_a_table_is_more_than_four_times_as_large() {
        let mut last = Last::default();
        assert!(!last.has_outgrown_plans(&[0, 1 << 20]));
        assert!(!last.has_outgrown_plans(&[256 << 10, 4 << 20]), "small, or not large enough");
        assert!(last.has_outgrown_plans(&[257 << 10, 4 << 20]));
        assert!(!last.has_outgrown_plans(&[1 << 20, 4 << 20]), "it is planned for that now");
        assert!(last.has_outgrown_plans(&[1 << 20, 17 << 20]));
    }
}
