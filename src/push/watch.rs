//! Tasks that somebody follows. Claims, heartbeats and completions notify nobody, since every NOTIFY
//! holds a lock of the whole cluster until commit; so what is followed here is read again and again,
//! all of it by one query. What is told is state: whoever reads slowly misses steps, not the end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

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
    /// Nothing yet.
    Unread,
    /// Where it stands.
    At(TaskView),
    /// It is not there (any more).
    Gone,
}

/// The tasks that somebody follows on this replica.
#[derive(Debug, Default)]
pub struct Watch {
    followed: Mutex<HashMap<TaskId, watch::Sender<Seen>>>,
    joined: Notify,
}

impl Watch {
    /// Follows a task; `None`: too many are followed.
    pub fn follow(&self, id: TaskId) -> Option<watch::Receiver<Seen>> {
        let mut followed = self.lock();
        if followed.len() >= FOLLOWED_MAX && !followed.contains_key(&id) {
            return None;
        }
        let sender = followed.entry(id).or_insert_with(|| watch::channel(Seen::Unread).0);
        if sender.receiver_count() >= FOLLOWERS_MAX {
            return None;
        }
        let receiver = sender.subscribe();
        drop(followed);
        self.joined.notify_one();
        Some(receiver)
    }

    /// What is followed, or only what was never read; forgets what nobody follows any more.
    fn ids(&self, unread_only: bool) -> Vec<TaskId> {
        let mut followed = self.lock();
        followed.retain(|_, sender| sender.receiver_count() > 0);
        let wanted =
            followed.iter().filter(|(_, sender)| !unread_only || *sender.borrow() == Seen::Unread);
        wanted.map(|(id, _)| *id).collect()
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

/// Reads what is followed, until shutdown. Who joins is served at once.
pub async fn run(store: Store, watch: Arc<Watch>, shutdown: Shutdown) {
    let mut due = Instant::now();
    loop {
        let wait = async {
            // However many join, the others get their turn.
            tokio::select! {
                biased;
                () = sleep_until(due) => false,
                () = watch.joined.notified() => true,
            }
        };
        let Some(joined) = shutdown.until_stopping(wait).await else {
            return;
        };
        let begun = Instant::now();
        let ids = watch.ids(joined);
        if let Err(error) = watch.read(&store, &ids).await {
            report("could not read the tasks that are followed", &error);
        }
        if !joined {
            due = Instant::now() + READ_EVERY.max(begun.elapsed() * READ_SHARE);
        }
    }
}
