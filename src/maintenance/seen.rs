//! Workers' signs of life: noted in memory by every call, written every few seconds, many at once.
//! A crash loses the last few seconds of them, which no timeout notices.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::every;
use crate::domain::WorkerId;
use crate::shutdown::Shutdown;
use crate::store::Store;

/// How often to write, at most; a short `WORKER_SSE_TIMEOUT` has it done more often.
const FLUSH_EVERY: Duration = Duration::from_secs(5);
/// How often to write, at least.
const FLUSH_FASTEST: Duration = Duration::from_millis(250);
/// Workers that may be noted between two writes; calls of further ones go unnoted until then.
const WORKERS_MAX: usize = 50_000;

/// Who called since the last write, and when.
#[derive(Debug, Default)]
pub struct Seen(Mutex<HashMap<WorkerId, Instant>>);

impl Seen {
    /// Notes a call.
    pub fn note(&self, worker: &WorkerId) {
        let mut seen = self.lock();
        if let Some(at) = seen.get_mut(worker) {
            *at = Instant::now();
        } else if seen.len() < WORKERS_MAX {
            seen.insert(worker.clone(), Instant::now());
        }
    }

    /// Forgets a worker that said farewell.
    pub fn forget(&self, worker: &WorkerId) {
        self.lock().remove(worker);
    }

    fn take(&self) -> Vec<(WorkerId, Duration)> {
        std::mem::take(&mut *self.lock()).into_iter().map(|(id, at)| (id, at.elapsed())).collect()
    }

    /// After a failed write: nothing noted is lost, and what was noted meanwhile is newer.
    fn put_back(&self, unwritten: Vec<(WorkerId, Duration)>) {
        let mut seen = self.lock();
        for (worker, ago) in unwritten {
            if let Some(at) = Instant::now().checked_sub(ago) {
                seen.entry(worker).or_insert(at);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<WorkerId, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes until shutdown.
pub async fn run(store: Store, notes: Arc<Seen>, shutdown: Shutdown) {
    let times = store.times();
    let period = (times.worker_timeout.min(times.lease) / 4).clamp(FLUSH_FASTEST, FLUSH_EVERY);
    every("the noting of signs of life failed", period, shutdown, async || {
        let seen = notes.take();
        if !seen.is_empty()
            && let Err(error) = store.worker_seen(&seen).await
        {
            notes.put_back(seen);
            return Err(error);
        }
        Ok(false)
    })
    .await;
}
