//! Calls that wait for a task to claim: workers that cannot hold a stream.
//!
//! One task wakes one of those that it is for, the one that has waited longest: more would only race
//! for it. Who was woken looks into Postgres by itself. What it was told of and does not take it passes
//! on: to those who came after it when it stays, to anyone when it leaves. So no news ends with
//! somebody who has no use for it, and none goes round in circles.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::domain::{Routing, Task, TaskId, TaskRouting, WorkerId};

/// Calls that may wait on one replica.
const WAITERS_MAX: usize = 4_096;
/// Tasks that one of them may have been told of; with more, all others are woken when it leaves.
const NEWS_MAX: usize = 64;

/// All calls that wait here, in the order in which they came.
#[derive(Debug, Default)]
pub struct Waiters(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    routing: Routing,
    /// It has looked, found nothing, and was told nothing since.
    is_asleep: bool,
    /// Told since its last look began.
    fresh: News,
    /// Told before, and being looked at.
    at_hand: News,
    /// Its worker's row has changed.
    is_rerouted: bool,
    wake: Arc<Notify>,
}

#[derive(Debug, Default)]
struct News {
    tasks: Vec<Told>,
    /// There was more, of whatever kind.
    more: bool,
}

/// A task, as far as it is needed to find whom it is for.
#[derive(Clone, Debug)]
struct Told {
    id: TaskId,
    codebase_id: String,
    required_capabilities: Vec<String>,
    target_worker_id: Option<String>,
    target_agent_name: Option<String>,
}

/// One call's place among those that wait.
#[derive(Debug)]
pub struct Waiter {
    all: Arc<Waiters>,
    number: u64,
    wake: Arc<Notify>,
}

impl Waiters {
    /// Waits from now on; `None`: too many do. How the worker is routed is to be told after the first
    /// [`Waiter::look`]: whatever changes from now on is noticed.
    pub fn enter(self: &Arc<Self>, worker_id: WorkerId) -> Option<Waiter> {
        let mut inner = self.lock();
        if inner.waiting.len() >= WAITERS_MAX {
            return None;
        }
        let number = inner.next;
        inner.next += 1;
        let wake = Arc::new(Notify::new());
        let routing = Routing {
            name: String::new(),
            codebases: Vec::new(),
            capabilities: Vec::new(),
            worker_id,
        };
        let waiting = Waiting {
            routing,
            is_asleep: false,
            fresh: News::default(),
            at_hand: News::default(),
            is_rerouted: true,
            wake: Arc::clone(&wake),
        };
        inner.waiting.insert(number, waiting);
        Some(Waiter { all: Arc::clone(self), number, wake })
    }

    /// Wakes one that a task is for.
    pub(super) fn wake_one(&self, task: &Task) {
        let mut inner = self.lock();
        if !inner.waiting.is_empty() {
            inner.tell(0, Told::new(task));
        }
    }

    /// Wakes all, or those that work on some codebases: nobody knows what there is.
    pub(super) fn wake_all(&self, codebases: Option<&HashSet<String>>) {
        for waiting in self.lock().waiting.values_mut() {
            let concerned = codebases
                .is_none_or(|ids| waiting.routing.codebases.iter().any(|own| ids.contains(own)));
            if concerned {
                waiting.wake();
            }
        }
    }

    /// Wakes those of some workers, or all, to look at how they are routed.
    pub(super) fn reroute(&self, workers: Option<&HashSet<WorkerId>>) {
        for waiting in self.lock().waiting.values_mut() {
            if workers.is_none_or(|ids| ids.contains(&waiting.routing.worker_id)) {
                waiting.is_rerouted = true;
                waiting.wake();
            }
        }
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().waiting.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Tells one of those from a number on; one that is busy only if nobody is asleep.
    fn tell(&mut self, from: u64, task: Told) {
        let mut busy = None;
        for (number, waiting) in self.waiting.range(from..) {
            if waiting.routing.matches(task.routing()) {
                if waiting.is_asleep {
                    busy = Some(*number);
                    break;
                }
                busy = busy.or(Some(*number));
            }
        }
        if let Some(waiting) = busy.and_then(|number| self.waiting.get_mut(&number)) {
            waiting.fresh.add(task);
            waiting.wake();
        }
    }

    fn pass_on(&mut self, from: u64, news: News, taken: &HashSet<TaskId>) {
        for task in news.tasks {
            if !taken.contains(&task.id) {
                self.tell(from, task);
            }
        }
        if news.more {
            self.waiting.range_mut(from..).for_each(|(_, waiting)| waiting.wake());
        }
    }
}

impl Waiting {
    fn wake(&mut self) {
        self.is_asleep = false;
        self.wake.notify_one();
    }
}

impl News {
    fn add(&mut self, task: Told) {
        if self.tasks.iter().any(|told| told.id == task.id) {
            return;
        }
        if self.tasks.len() < NEWS_MAX { self.tasks.push(task) } else { self.more = true }
    }

    fn append(&mut self, other: News) {
        other.tasks.into_iter().for_each(|task| self.add(task));
        self.more |= other.more;
    }
}

impl Told {
    fn new(task: &Task) -> Self {
        Self {
            id: task.id,
            codebase_id: task.codebase_id.clone(),
            required_capabilities: task.required_capabilities.clone(),
            target_worker_id: task.target_worker_id.clone(),
            target_agent_name: task.target_agent_name.clone(),
        }
    }

    fn routing(&self) -> TaskRouting<'_> {
        TaskRouting {
            codebase_id: &self.codebase_id,
            required_capabilities: &self.required_capabilities,
            target_worker_id: self.target_worker_id.as_deref(),
            target_agent_name: self.target_agent_name.as_deref(),
        }
    }
}

impl Waiter {
    /// Sleeps until there are news.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    /// To be called before each look: what is told from now on is for the next one. True: the worker's
    /// row has changed.
    #[must_use]
    pub fn look(&self) -> bool {
        let mut inner = self.all.lock();
        let Some(waiting) = inner.waiting.get_mut(&self.number) else { return false };
        waiting.is_asleep = false;
        let fresh = std::mem::take(&mut waiting.fresh);
        waiting.at_hand.append(fresh);
        std::mem::take(&mut waiting.is_rerouted)
    }

    /// How its worker is routed now.
    pub fn reroute(&self, routing: Routing) {
        if let Some(waiting) = self.all.lock().waiting.get_mut(&self.number) {
            waiting.routing = routing;
        }
    }

    /// What it was told of before its look began.
    #[must_use]
    pub fn at_hand(&self) -> Vec<TaskId> {
        let inner = self.all.lock();
        let waiting = inner.waiting.get(&self.number);
        waiting.into_iter().flat_map(|waiting| &waiting.at_hand.tasks).map(|told| told.id).collect()
    }

    /// To be called after a look that found nothing: what it was told of goes on to those who came
    /// later, but for what is gone.
    pub fn found_nothing(&self, gone: &HashSet<TaskId>) {
        let mut inner = self.all.lock();
        let Some(waiting) = inner.waiting.get_mut(&self.number) else { return };
        waiting.is_asleep = waiting.fresh.tasks.is_empty() && !waiting.is_rerouted;
        let news = std::mem::take(&mut waiting.at_hand);
        inner.pass_on(self.number + 1, news, gone);
    }

    /// Leaves with some tasks.
    pub fn leave_with(self, taken: &HashSet<TaskId>) {
        self.leave(taken);
    }

    fn leave(&self, taken: &HashSet<TaskId>) {
        let mut inner = self.all.lock();
        if let Some(waiting) = inner.waiting.remove(&self.number) {
            let mut news = waiting.at_hand;
            news.append(waiting.fresh);
            // To whoever came before, too: it may have looked a moment too early.
            inner.pass_on(0, news, taken);
            if !taken.is_empty() {
                // A repetition of this call waits for what this one got.
                let same =
                    |other: &&mut Waiting| other.routing.worker_id == waiting.routing.worker_id;
                inner.waiting.values_mut().filter(same).for_each(Waiting::wake);
            }
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.leave(&HashSet::new());
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn enter(waiters: &Arc<Waiters>, codebases: &[&str]) -> Waiter {
        let worker_id = WorkerId::generate();
        let waiter = waiters.enter(worker_id.clone()).unwrap();
        assert!(waiter.look());
        waiter.reroute(Routing {
            worker_id,
            name: "w".to_owned(),
            codebases: codebases.iter().map(|id| (*id).to_owned()).collect(),
            capabilities: Vec::new(),
        });
        waiter.found_nothing(&HashSet::new());
        waiter
    }

    fn tell(waiters: &Waiters, codebase: &str) -> TaskId {
        let id = TaskId::generate();
        let told = Told {
            id,
            codebase_id: codebase.to_owned(),
            required_capabilities: Vec::new(),
            target_worker_id: None,
            target_agent_name: None,
        };
        waiters.lock().tell(0, told);
        id
    }

    fn is_woken(waiter: &Waiter) -> bool {
        let woken = waiter.woken().now_or_never().is_some();
        woken && !waiter.look()
    }

    #[test]
    fn a_task_wakes_the_one_that_has_waited_longest_of_those_that_it_is_for() {
        let waiters = Arc::new(Waiters::default());
        let others = enter(&waiters, &["b"]);
        let first = enter(&waiters, &["a"]);
        let second = enter(&waiters, &["a"]);
        tell(&waiters, "a");
        assert!(is_woken(&first) && !is_woken(&second) && !is_woken(&others));
        // The first one is looking now.
        tell(&waiters, "a");
        assert!(is_woken(&second) && !is_woken(&first) && !is_woken(&others));
    }

    #[test]
    fn what_one_has_no_use_for_goes_on_to_those_who_came_later_until_it_is_gone() {
        let waiters = Arc::new(Waiters::default());
        let both = enter(&waiters, &["a", "b"]);
        let only_b = enter(&waiters, &["b"]);
        let only_a = enter(&waiters, &["a"]);
        tell(&waiters, "a");
        let better = tell(&waiters, "b");
        assert!(is_woken(&both) && is_woken(&only_b) && !is_woken(&only_a));
        // The first one takes what the second was told of.
        both.leave_with(&[better].into());
        assert!(is_woken(&only_a), "and what it leaves goes on");
        only_b.found_nothing(&[better].into());
        only_a.found_nothing(&HashSet::new());
        assert!(!is_woken(&only_b) && !is_woken(&only_a), "nobody came later");
    }

    #[test]
    fn who_looked_a_moment_too_early_is_told_by_the_one_who_leaves() {
        let waiters = Arc::new(Waiters::default());
        let early = enter(&waiters, &["a"]);
        let late = enter(&waiters, &["a"]);
        let first = tell(&waiters, "a");
        assert!(is_woken(&early));
        // It is looking, and does not see this one any more.
        tell(&waiters, "a");
        assert!(is_woken(&late));
        late.leave_with(&[first].into());
        early.found_nothing(&[first].into());
        assert!(is_woken(&early));
    }

    #[test]
    fn who_gives_up_passes_on_what_it_was_told_before_and_during_its_look() {
        let waiters = Arc::new(Waiters::default());
        let first = enter(&waiters, &["a"]);
        tell(&waiters, "a");
        assert!(is_woken(&first));
        tell(&waiters, "a");
        let second = enter(&waiters, &["a"]);
        drop(first);
        assert!(is_woken(&second));
        assert_eq!(second.at_hand().len(), 2);
        drop(second);
        assert!(waiters.is_empty());
    }
}
