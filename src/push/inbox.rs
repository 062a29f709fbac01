//! Hints, merged. The listener only reads and merges: one that waits would hold back VACUUM in the
//! whole database. So merging never waits and never grows without bound; what does not fit becomes
//! "look at everything", which is always right, only dearer.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;
use uuid::Uuid;

use crate::domain::limits::is_id;
use crate::domain::{TaskId, WorkerId};

/// Tasks that may wait to be looked up; more become a look at all codebases.
const TASKS_MAX: usize = 20_000;
/// Codebases that may wait; more become all.
const CODEBASES_MAX: usize = 1_000;
/// Cancellations and workers that may wait; more become a look at everything.
const OTHERS_MAX: usize = 20_000;

/// What is to be looked at.
#[derive(Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in migrations/V3")]
pub struct Hints {
    pub tasks: HashSet<TaskId>,
    pub codebases: HashSet<String>,
    pub all_codebases: bool,
    pub cancels: HashSet<TaskId>,
    pub workers: HashSet<WorkerId>,
    /// Tasks of workers with slots, of which some may be free. What is lost is found by the next look.
    pub slots: HashSet<(WorkerId, TaskId)>,
    /// Tasks that came into such a slot in the answer that ended the one before.
    pub came: HashSet<(WorkerId, TaskId)>,
    /// After a loss: every stream's presence, routing and backlog.
    pub everything: bool,
}

/// What one notification says.
#[derive(Debug, PartialEq, Eq)]
enum Hint<'a> {
    Tasks(Vec<TaskId>),
    Codebases(Vec<&'a str>),
    AllCodebases,
    Cancel(TaskId),
    Worker(WorkerId),
    Slots(Vec<(WorkerId, SlotTask)>),
    Canary(&'a str),
}

/// A task of a worker with slots that has a stream elsewhere.
#[derive(Debug, PartialEq, Eq)]
enum SlotTask {
    Ended(TaskId),
    Came(TaskId),
}

/// The place where hints wait for the router.
#[derive(Debug, Default)]
pub struct Inbox {
    hints: Mutex<Hints>,
    filled: Notify,
}

/// What a merged notification was, as far as the listener cares.
#[derive(Debug, PartialEq, Eq)]
pub enum Merged<'a> {
    /// Merged, or nothing in it.
    Hint,
    /// Somebody's canary.
    Canary(&'a str),
    /// Not one of ours: anyone with a psql prompt can NOTIFY.
    Unreadable,
}

impl Inbox {
    /// Merges a notification's payload.
    pub fn merge<'a>(&self, payload: &'a str) -> Merged<'a> {
        let Some(hint) = read(payload) else {
            return Merged::Unreadable;
        };
        if let Hint::Canary(text) = hint {
            return Merged::Canary(text);
        }
        self.put(|hints| match hint {
            Hint::Tasks(ids) => hints.tasks.extend(ids),
            Hint::Codebases(ids) => hints.codebases.extend(ids.into_iter().map(str::to_owned)),
            Hint::AllCodebases => hints.all_codebases = true,
            Hint::Cancel(id) => {
                hints.cancels.insert(id);
            }
            Hint::Worker(id) => {
                hints.workers.insert(id);
            }
            Hint::Slots(pairs) => {
                for (worker, task) in pairs {
                    match task {
                        SlotTask::Ended(id) => hints.slots.insert((worker, id)),
                        SlotTask::Came(id) => hints.came.insert((worker, id)),
                    };
                }
            }
            Hint::Canary(_) => {}
        });
        Merged::Hint
    }

    /// Adds tasks that the sweep found, or that were offered in vain.
    pub fn add_tasks(&self, ids: impl IntoIterator<Item = TaskId>) {
        self.put(|hints| hints.tasks.extend(ids));
    }

    /// Has the backlogs of some codebases read again.
    pub fn add_codebases(&self, ids: impl IntoIterator<Item = String>) {
        self.put(|hints| hints.codebases.extend(ids));
    }

    /// Has every backlog read again.
    pub fn add_all_codebases(&self) {
        self.put(|hints| hints.all_codebases = true);
    }

    /// Has everything looked at again.
    pub fn add_everything(&self) {
        self.put(|hints| hints.everything = true);
    }

    /// All that is there; waits for something.
    pub async fn take(&self) -> Hints {
        loop {
            let hints =
                std::mem::take(&mut *self.hints.lock().unwrap_or_else(PoisonError::into_inner));
            if hints != Hints::default() {
                return hints;
            }
            self.filled.notified().await;
        }
    }

    fn put(&self, change: impl FnOnce(&mut Hints)) {
        let mut hints = self.hints.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut hints);
        hints.bound();
        drop(hints);
        self.filled.notify_one();
    }
}

impl Hints {
    fn bound(&mut self) {
        if self.tasks.len() > TASKS_MAX {
            self.tasks = HashSet::new();
            self.all_codebases = true;
        }
        if self.codebases.len() > CODEBASES_MAX {
            self.codebases = HashSet::new();
            self.all_codebases = true;
        }
        if self.cancels.len() > OTHERS_MAX || self.workers.len() > OTHERS_MAX {
            self.cancels = HashSet::new();
            self.workers = HashSet::new();
            self.everything = true;
        }
        if self.slots.len() > OTHERS_MAX || self.came.len() > OTHERS_MAX {
            self.slots = HashSet::new();
            self.came = HashSet::new();
        }
    }
}

/// Reads a payload; `None` for what no trigger of ours would write.
fn read(payload: &str) -> Option<Hint<'_>> {
    let (word, rest) = payload.split_once(' ')?;
    let task = |text: &str| Uuid::try_parse(text).ok().map(TaskId);
    match word {
        "tasks" => rest.split(' ').map(task).collect::<Option<_>>().map(Hint::Tasks),
        "codebases" if rest == "*" => Some(Hint::AllCodebases),
        "codebases" => rest
            .split(' ')
            .map(|id| is_id(id).then_some(id))
            .collect::<Option<_>>()
            .map(Hint::Codebases),
        "cancel" => task(rest).map(Hint::Cancel),
        "worker" => WorkerId::parse(rest).ok().map(Hint::Worker),
        "slots" => {
            let words: Vec<_> = rest.split(' ').collect();
            let slot_task = |text: &str| match text.strip_prefix('+') {
                Some(came) => task(came).map(SlotTask::Came),
                None => task(text).map(SlotTask::Ended),
            };
            let pair = |pair: &[&str]| {
                Some((WorkerId::parse(pair.first()?).ok()?, slot_task(pair.get(1)?)?))
            };
            words.chunks(2).map(pair).collect::<Option<_>>().map(Hint::Slots)
        }
        "canary" => Some(Hint::Canary(rest)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[tokio::test]
    async fn hints_of_many_notifications_are_taken_as_one() {
        let inbox = Inbox::default();
        let (a, b) = (TaskId::generate(), TaskId::generate());
        assert_eq!(inbox.merge(&format!("tasks {a} {b}")), Merged::Hint);
        assert_eq!(inbox.merge(&format!("tasks {a}")), Merged::Hint);
        assert_eq!(inbox.merge("worker w-1"), Merged::Hint);
        assert_eq!(inbox.merge(&format!("slots w-1 {a} w-2 {b} w-1 +{b}")), Merged::Hint);
        assert_eq!(inbox.merge(&format!("slots w-1 {a} w-2")), Merged::Unreadable);
        assert_eq!(inbox.merge("canary x 1"), Merged::Canary("x 1"));
        assert_eq!(inbox.merge("tasks nonsense"), Merged::Unreadable);
        let hints = inbox.take().await;
        assert_eq!(hints.tasks, [a, b].into());
        assert_eq!((hints.workers.len(), hints.slots.len(), hints.came.len()), (1, 2, 1));
    }

    #[tokio::test]
    async fn too_many_tasks_become_a_look_at_all_codebases() {
        let inbox = Inbox::default();
        inbox.add_tasks((0..=TASKS_MAX).map(|_| TaskId::generate()));
        let hints = inbox.take().await;
        assert!(hints.tasks.is_empty() && hints.all_codebases);
    }

    proptest! {
        #[test]
        fn no_payload_does_harm(payload in ".{0,200}") {
            Inbox::default().merge(&payload);
        }

        #[test]
        fn nor_one_that_looks_like_ours(word in "tasks|codebases|cancel|worker|slots|canary", rest in ".{0,99}") {
            Inbox::default().merge(&format!("{word} {rest}"));
        }
    }
}
