//! Calls that wait for a task to claim: workers that cannot hold a stream.
//!
//! One task wakes one of those that it is for, the one that has waited longest: more would only race
//! for it. Who was woken looks into Postgres by itself; so a wake-up is a hint, and whoever gives up
//! after one passes it on.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::domain::{Routing, TaskRouting};

/// Calls that may wait on one replica.
const WAITERS_MAX: usize = 4_096;

/// All calls that wait here, in the order in which they came.
#[derive(Debug, Default)]
pub struct Waiters {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    waiting: BTreeMap<u64, Arc<Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    routing: Routing,
    state: AtomicU8,
    wake: Notify,
}

/// It looks into Postgres at the moment.
const LOOKING: u8 = 0;
/// It has looked and found nothing.
const ASLEEP: u8 = 1;
/// It is to look again.
const WOKEN: u8 = 2;

/// One call's place among those that wait.
#[derive(Debug)]
pub struct Waiter {
    all: Arc<Waiters>,
    number: u64,
    own: Arc<Waiting>,
}

impl Waiters {
    /// Waits from now on; `None`: too many do.
    pub fn enter(self: &Arc<Self>, routing: Routing) -> Option<Waiter> {
        let mut inner = self.lock();
        if inner.waiting.len() >= WAITERS_MAX {
            return None;
        }
        let number = inner.next;
        inner.next += 1;
        let own = Arc::new(Waiting { routing, state: AtomicU8::new(LOOKING), wake: Notify::new() });
        inner.waiting.insert(number, Arc::clone(&own));
        Some(Waiter { all: Arc::clone(self), number, own })
    }

    /// Wakes one that a task is for; one that is looking only if there is no other, as it may be about
    /// to leave with what it found.
    pub(super) fn wake_one(&self, task: TaskRouting<'_>) {
        let inner = self.lock();
        let first = |state| {
            inner.waiting.values().find(|waiting| {
                waiting.state.load(Ordering::SeqCst) == state && waiting.routing.matches(task)
            })
        };
        if let Some(waiting) = first(ASLEEP).or_else(|| first(LOOKING)) {
            waiting.wake();
        }
    }

    /// Wakes all: nobody knows what there is.
    pub(super) fn wake_all(&self) {
        self.lock().waiting.values().for_each(|waiting| waiting.wake());
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().waiting.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn wake(&self) {
        self.state.store(WOKEN, Ordering::SeqCst);
        self.wake.notify_one();
    }
}

impl Waiter {
    /// Sleeps until woken. To be called after a look that found nothing.
    pub async fn woken(&self) {
        let state = &self.own.state;
        let _ = state.compare_exchange(LOOKING, ASLEEP, Ordering::SeqCst, Ordering::SeqCst);
        self.own.wake.notified().await;
    }

    /// To be called before each look: what becomes claimable from now on wakes again.
    pub fn look(&self) {
        self.own.state.store(LOOKING, Ordering::SeqCst);
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.all.lock().waiting.remove(&self.number);
        // It was told of something and has not looked.
        if self.own.state.load(Ordering::SeqCst) == WOKEN {
            self.all.wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::domain::WorkerId;

    fn routing(codebase: &str) -> Routing {
        Routing {
            worker_id: WorkerId::parse("w").unwrap(),
            name: "w".to_owned(),
            codebases: vec![codebase.to_owned()],
            capabilities: Vec::new(),
        }
    }

    fn task(codebase_id: &str) -> TaskRouting<'_> {
        TaskRouting {
            codebase_id,
            required_capabilities: &[],
            target_worker_id: None,
            target_agent_name: None,
        }
    }

    fn is_woken(waiter: &Waiter) -> bool {
        let woken = waiter.woken().now_or_never().is_some();
        if woken {
            waiter.look();
        }
        woken
    }

    #[test]
    fn a_task_wakes_the_one_that_has_waited_longest_of_those_that_it_is_for() {
        let waiters = Arc::new(Waiters::default());
        let others = waiters.enter(routing("b")).unwrap();
        let first = waiters.enter(routing("a")).unwrap();
        let second = waiters.enter(routing("a")).unwrap();
        assert!(!is_woken(&others) && !is_woken(&first) && !is_woken(&second));
        waiters.wake_one(task("a"));
        assert!(is_woken(&first) && !is_woken(&second) && !is_woken(&others));
        // The first one is looking now.
        waiters.wake_one(task("a"));
        assert!(is_woken(&second) && !is_woken(&first) && !is_woken(&others));
    }

    #[test]
    fn who_leaves_without_having_looked_passes_the_news_on() {
        let waiters = Arc::new(Waiters::default());
        let first = waiters.enter(routing("a")).unwrap();
        let second = waiters.enter(routing("a")).unwrap();
        waiters.wake_one(task("a"));
        drop(first);
        assert!(is_woken(&second));
        drop(second);
        assert!(waiters.is_empty());
    }
}
