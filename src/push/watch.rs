//! Tasks that somebody follows. Claims, heartbeats and completions notify nobody, since every NOTIFY
//! holds a lock of the whole cluster until commit; so what is followed here is read again and again,
//! all of it by one query. What is told is state: whoever reads slowly misses steps, not the end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::domain::TaskId;
use crate::shutdown::Shutdown;
use crate::store::{Store, StoreError, TaskView, report};

/// How often what is followed is read.
const READ_EVERY: Duration = Duration::from_millis(250);
/// Reading may take this share of the time, as one in so many.
const READ_SHARE: u32 = 10;
/// Tasks that one statement reads.
const READ_TASKS_MAX: usize = 1_000;
/// Tasks that may be followed on one replica.
const FOLLOWED_MAX: usize = 4_096;
/// Followers of one task.
const FOLLOWERS_MAX: usize = 1_000;

/// What is known of a followed task.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// Where it stands.
    At(TaskView),
    /// It is not there (any more).
    Gone,
}

/// The tasks that somebody follows on this replica.
#[derive(Debug, Default)]
pub struct Watch {
    followed: Mutex<HashMap<TaskId, watch::Sender<Seen>>>,
}

impl Watch {
    /// Follows a task from where it was just read to stand; `None`: too many are followed.
    pub fn follow(&self, view: TaskView) -> Option<watch::Receiver<Seen>> {
        let mut followed = self.lock();
        if followed.len() >= FOLLOWED_MAX && !followed.contains_key(&view.id) {
            return None;
        }
        let sender = followed.entry(view.id).or_insert_with(|| watch::channel(Seen::At(view)).0);
        (sender.receiver_count() < FOLLOWERS_MAX).then(|| sender.subscribe())
    }

    /// What is followed; forgets what nobody follows any more.
    fn ids(&self) -> Vec<TaskId> {
        let mut followed = self.lock();
        followed.retain(|_, sender| sender.receiver_count() > 0);
        followed.keys().copied().collect()
    }

    fn tell(&self, id: TaskId, seen: Seen) {
        if let Some(sender) = self.lock().get(&id) {
            sender.send_if_modified(|last| {
                let is_new = *last != seen;
                *last = seen;
                is_new
            });
        }
    }

    async fn read(&self, store: &Store, ids: &[TaskId]) -> Result<(), StoreError> {
        for ids in ids.chunks(READ_TASKS_MAX) {
            let mut found: HashMap<_, _> =
                store.task_watch(ids).await?.into_iter().map(|view| (view.id, view)).collect();
            for id in ids {
                self.tell(*id, found.remove(id).map_or(Seen::Gone, Seen::At));
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TaskId, watch::Sender<Seen>>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads what is followed, until shutdown.
pub async fn run(store: Store, watch: Arc<Watch>, shutdown: Shutdown) {
    let mut pause = READ_EVERY;
    while shutdown.until_stopping(tokio::time::sleep(pause)).await.is_some() {
        let begun = Instant::now();
        if let Err(error) = watch.read(&store, &watch.ids()).await {
            report("could not read the tasks that are followed", &error);
        }
        pause = READ_EVERY.max(begun.elapsed() * READ_SHARE);
    }
}
