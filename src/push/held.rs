//! What workers with slots hold, compared with Postgres again and again: the truth behind every hint that a
//! slot is free, behind reconnects, and behind claims of which nobody knows whether they were made.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::hub::Hub;
use super::slots::{GONE_FOR, Look};
use super::stream::Stream;
use crate::domain::{TaskId, WorkerId};
use crate::shutdown::{Shutdown, jittered};
use crate::store::{Store, StoreError, report};

/// How often all streams with slots are looked at; with jitter, under 2 s.
const LOOK_EVERY: Duration = Duration::from_millis(1_500);
/// Workers, or tasks, that one statement asks about.
const LOOKUP_MAX: usize = 500;

/// Compares, until shutdown.
pub async fn run(store: Store, hub: Arc<Hub>, shutdown: Shutdown) {
    let mut pause = jittered(LOOK_EVERY);
    let mut since_all = Duration::ZERO;
    while shutdown.until_stopping(tokio::time::sleep(pause)).await.is_some() {
        since_all += pause;
        let is_round = since_all >= LOOK_EVERY / 2;
        let streams = hub.streams().into_iter().filter(|stream| stream.has_slots);
        let streams: Vec<_> = if is_round {
            since_all = Duration::ZERO;
            streams.collect()
        } else {
            streams.filter(|stream| stream.is_doubtful()).collect()
        };
        if let Err(error) = look(&store, &hub, &streams).await {
            report("could not read what workers hold, will try again", &error);
        }
        let is_doubtful = streams.iter().any(|stream| stream.is_doubtful());
        pause = if is_doubtful { GONE_FOR } else { jittered(LOOK_EVERY) };
    }
}

/// Looks at all that the workers of some streams hold.
pub(super) async fn look(
    store: &Store,
    hub: &Hub,
    streams: &[Arc<Stream>],
) -> Result<(), StoreError> {
    for streams in streams.chunks(LOOKUP_MAX) {
        let began: Vec<_> = streams.iter().map(|stream| stream.look_begins()).collect();
        let workers: Vec<_> = streams.iter().map(|stream| stream.worker_id.clone()).collect();
        let held = store.slots_held(&workers).await?;
        for ((stream, began), held) in streams.iter().zip(began).zip(held) {
            if let (Some(began), Some(held)) = (began, held) {
                stream.look(began, Look::All(&held), false);
                hub.fill(stream);
            }
        }
    }
    Ok(())
}

/// Looks at some tasks of some workers, as far as they have streams with slots here. `proves`: what is not
/// held any more was ended by its worker, which has read its stream so far. `came`: these took the slot of
/// another one. What is not held any more by now, and of whose end nothing was said yet, keeps the slot until
/// it is: the next one may be in it already.
pub(super) async fn check(
    store: &Store,
    hub: &Hub,
    ended: &HashSet<(WorkerId, TaskId)>,
    came: &HashSet<(WorkerId, TaskId)>,
    proves: bool,
) -> Result<(), StoreError> {
    let mut streams = HashMap::new();
    let mut here = Vec::new();
    for (worker, task) in ended.union(came).cloned() {
        let stream = streams.entry(worker.clone()).or_insert_with(|| hub.with_slots(&worker));
        if stream.is_some() {
            here.push((worker, task));
        }
    }
    // All tasks of a worker in one statement: one may have come in place of another.
    here.sort_unstable();
    for asked in
        here.chunk_by(|(one, _), (other, _)| one == other).collect::<Vec<_>>().chunks(LOOKUP_MAX)
    {
        let began: HashMap<_, _> = asked
            .iter()
            .filter_map(|own| {
                let stream = streams.get(&own.first()?.0)?.as_ref()?;
                Some((stream.worker_id.clone(), (stream, stream.look_begins()?)))
            })
            .collect();
        let asked: Vec<_> = asked.iter().flat_map(|own| own.iter().cloned()).collect();
        let found = store.slots_check(&asked).await?;
        let mut answers: Vec<_> = asked.iter().zip(found).collect();
        // What came first, then what is gone: never more than there are slots.
        answers.sort_by_key(|(_, found)| found.is_none());
        for ((worker, task), found) in answers {
            if let Some((stream, began)) = began.get(worker) {
                let pair = (worker.clone(), *task);
                let look = if found.is_none() && came.contains(&pair) && !ended.contains(&pair) {
                    Look::Passing(*task)
                } else {
                    Look::Task(*task, found)
                };
                stream.look(*began, look, proves);
            }
        }
        for (stream, _) in began.values() {
            hub.fill(stream);
        }
    }
    Ok(())
}

impl Hub {
    /// The stream with slots that a worker has here. (Of two, the newer one ends the older at once.)
    pub(super) fn with_slots(&self, worker: &WorkerId) -> Option<Arc<Stream>> {
        self.index().of_worker(worker).into_iter().rfind(|stream| stream.has_slots)
    }

    /// A worker ended a claim, here: its slot is free, and it has read its stream so far. False: its stream
    /// with slots, if it has one, is elsewhere.
    pub fn finished(&self, worker: &WorkerId, task: TaskId, epoch: i64) -> bool {
        let Some(stream) = self.with_slots(worker) else { return false };
        stream.finish(task, epoch, false);
        self.fill(&stream);
        true
    }

    /// The same, and the slot is kept for the next task, which its worker is given in the same answer.
    pub fn finished_for_next(
        &self,
        worker: &WorkerId,
        task: TaskId,
        epoch: i64,
    ) -> Option<NextSlot> {
        let stream = self.with_slots(worker)?;
        let claim_id = stream.finish(task, epoch, true)?;
        Some(NextSlot { stream, claim_id })
    }

    /// The slot got its next task; none: it is free.
    pub fn next_came(&self, slot: NextSlot, next: Option<(TaskId, i64)>) {
        let NextSlot { stream, claim_id } = slot;
        match next {
            Some((task, epoch)) => {
                stream.hold(task, epoch, Some(claim_id));
                // Its worker has begun anew meanwhile: the answer may be to nobody.
                let newer = self.with_slots(&stream.worker_id);
                if let Some(newer) = newer.filter(|newer| !Arc::ptr_eq(newer, &stream)) {
                    newer.owe(task, epoch);
                    self.fill(&newer);
                }
            }
            None => stream.give_up(claim_id),
        }
        self.fill(&stream);
    }

    /// A worker claimed a task by itself: that counts against its slots.
    pub fn claimed(&self, worker: &WorkerId, task: TaskId, epoch: i64) {
        if let Some(stream) = self.with_slots(worker) {
            stream.hold(task, epoch, None);
        }
    }

    /// A worker showed a sign of life of a claim: it has read its stream so far.
    pub fn acted_on(&self, worker: &WorkerId, task: TaskId) {
        if let Some(stream) = self.with_slots(worker) {
            stream.acted_on(task);
            self.fill(&stream);
        }
    }
}

/// A slot between two tasks.
#[derive(Debug)]
pub struct NextSlot {
    stream: Arc<Stream>,
    claim_id: uuid::Uuid,
}
