//! Workers' signs of life: noted in memory by every call, written every few seconds, many at once.
//! With them goes what a worker asked for where it has no stream: its stream, elsewhere, may
//! wait for the proof that it was read (see `push::unread`).
//! A crash loses the last few seconds of them, which no timeout notices.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::every;
use crate::domain::{Asked, WorkerId};
use crate::shutdown::Shutdown;
use crate::store::{SeenWorker, Store};

/// How often to write, at most; a short `WORKER_SSE_TIMEOUT` has it done more often.
const FLUSH_EVERY: Duration = Duration::from_secs(5);
/// How often to write, at least.
const FLUSH_FASTEST: Duration = Duration::from_millis(250);
/// How often to write what workers asked for.
const FLUSH_ASKED_EVERY: Duration = Duration::from_secs(1);
/// Workers that may be noted between two writes; calls of further ones go unnoted until then.
const WORKERS_MAX: usize = 50_000;

/// Who called since the last write, and when.
#[derive(Debug, Default)]
pub struct Seen(Mutex<Notes>);

#[derive(Debug, Default)]
struct Notes {
    workers: HashMap<WorkerId, Note>,
    /// Some of them asked for a certain task.
    has_asked: bool,
    taken_at: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Note {
    at: Instant,
    /// What it asked for last, and when: a task, in vain, or whatever was best.
    asked: Option<(Asked, Instant)>,
}

impl Seen {
    /// Notes a call.
    pub fn note(&self, worker: &WorkerId) {
        self.lock().note(worker, None);
    }

    /// Notes that a worker that has no stream here asked for a task in vain, or for whatever is best.
    pub fn note_asked(&self, worker: &WorkerId, asked: Asked) {
        self.lock().note(worker, Some(asked));
    }

    /// Forgets a worker that said farewell.
    pub fn forget(&self, worker: &WorkerId) {
        self.lock().workers.remove(worker);
    }

    /// All that was noted; nothing while nothing is urgent and the last time is not so long ago.
    fn take(&self, period: Duration) -> HashMap<WorkerId, Note> {
        let mut notes = self.lock();
        let is_time = notes.taken_at.is_none_or(|at| at.elapsed() >= period);
        if !is_time && !notes.has_asked {
            return HashMap::new();
        }
        notes.has_asked = false;
        notes.taken_at = Some(Instant::now());
        std::mem::take(&mut notes.workers)
    }

    /// After a failed write: nothing noted is lost, and what was noted meanwhile is newer.
    fn put_back(&self, unwritten: HashMap<WorkerId, Note>) {
        let mut notes = self.lock();
        for (worker, before) in unwritten {
            notes.has_asked |= before.asked.is_some_and(|(asked, _)| asked.is_urgent());
            let note = notes.workers.entry(worker).or_insert(before);
            note.asked = note.asked.or(before.asked);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notes {
    fn note(&mut self, worker: &WorkerId, asked: Option<Asked>) {
        let at = Instant::now();
        let asked = asked.map(|asked| (asked, at));
        if let Some(note) = self.workers.get_mut(worker) {
            *note = Note { at, asked: asked.or(note.asked) };
        } else if self.workers.len() < WORKERS_MAX {
            self.workers.insert(worker.clone(), Note { at, asked });
        } else {
            return;
        }
        self.has_asked |= asked.is_some_and(|(asked, _)| asked.is_urgent());
    }
}

/// Writes until shutdown.
pub async fn run(store: Store, notes: Arc<Seen>, shutdown: Shutdown) {
    let times = store.times();
    let period = (times.worker_timeout.min(times.lease) / 4).clamp(FLUSH_FASTEST, FLUSH_EVERY);
    let look_every = period.min(FLUSH_ASKED_EVERY);
    every("the noting of signs of life failed", look_every, shutdown, async || {
        // Half a look early rather than one late.
        let seen = notes.take(period.saturating_sub(look_every / 2));
        let columns: Vec<_> = seen.iter().map(|(worker, note)| column(worker, *note)).collect();
        if !columns.is_empty()
            && let Err(error) = store.worker_seen(&columns).await
        {
            notes.put_back(seen);
            return Err(error);
        }
        Ok(false)
    })
    .await;
}

fn column(worker: &WorkerId, note: Note) -> SeenWorker {
    SeenWorker {
        worker_id: worker.clone(),
        ago: note.at.elapsed(),
        asked: note.asked.map(|(asked, at)| (asked, at.elapsed())),
    }
}
