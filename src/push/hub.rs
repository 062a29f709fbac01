//! The streams of this replica, and which of them a task concerns.
//!
//! An index by codebase makes the cost of a task that of the streams that match, not of the streams
//! there are. Everything here may be lost: a stream that reconnects elsewhere is rebuilt from
//! Postgres.
//!
//! Locks are taken in one order: the hub's, a stream's, its mailbox's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::announcement::Announcement;
use super::assign::Errands;
use super::frames::End;
use super::index::Index;
use super::narrow::Narrow;
use super::stream::Stream;
use super::waiters::Waiters;
use crate::domain::routing::is_for_all;
use crate::domain::{Asked, ConnectionId, Fanout, Routing, TaskId, WorkerId};
use crate::metrics::Metrics;

/// Connections whose presence is ended by one statement.
const DEPARTURES_MAX: usize = 500;

/// At which of the maximum age streams are ended: those that were opened at once are not ended so.
const AGES: std::ops::Range<f64> = 0.75..1.25;

/// All streams of this replica.
#[derive(Debug)]
pub struct Hub {
    index: Mutex<Index>,
    pub(super) attention: Notify,
    departure: Notify,
    /// After how long streams are ended, about; zero: never.
    max_age: Duration,
    /// What is to be done for streams with slots.
    pub(super) errands: Errands,
    /// Calls that wait for a task to claim.
    pub waiters: Arc<Waiters>,
    /// Tasks that were offered to few workers first.
    pub(super) narrow: Narrow,
    pub(super) metrics: Arc<Metrics>,
}

impl Hub {
    /// A hub without streams.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>, max_age: Duration, fanout: Fanout) -> Self {
        Self {
            index: Mutex::default(),
            attention: Notify::new(),
            departure: Notify::new(),
            max_age,
            errands: Errands::default(),
            waiters: Arc::default(),
            narrow: Narrow::new(fanout),
            metrics,
        }
    }

    pub(super) fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a stream: from now on it hears of what happens. Its backlog follows, read after this,
    /// so that nothing falls between the two (protocol S5).
    pub fn subscribe(
        &self,
        connection_id: ConnectionId,
        routing: Routing,
        window_size: usize,
        wants_task: bool,
        slots: Option<usize>,
        first: Bytes,
    ) -> Arc<Stream> {
        let (worker_id, codebases) = (routing.worker_id.clone(), routing.codebases.clone());
        let ages_at = (!self.max_age.is_zero())
            .then(|| std::time::Instant::now() + self.max_age.mul_f64(rand::random_range(AGES)));
        let stream =
            Arc::new(Stream::new(connection_id, routing, window_size, wants_task, slots, ages_at));
        stream.deliver(first);
        self.errands.opened(&stream);
        let mut index = self.index();
        index.add(&stream, &codebases);
        index.by_worker.entry(worker_id).or_default().push(connection_id);
        index.streams.insert(connection_id, Arc::clone(&stream));
        // What changed since its row was written told nobody here: so presence and routing are
        // looked at as well.
        index.attention.ask(connection_id, true);
        self.count(&index);
        drop(index);
        self.attention.notify_one();
        stream
    }

    /// Removes a stream whose connection is gone; its presence follows (see `presence`). False: it
    /// was removed before.
    pub fn unsubscribe(&self, stream: &Stream) -> bool {
        let mut index = self.index();
        if index.streams.remove(&stream.connection_id).is_none() {
            return false;
        }
        index.remove(stream.connection_id, &stream.routing().codebases);
        index.attention.forget(stream.connection_id);
        if let Some(own) = index.by_worker.get_mut(&stream.worker_id) {
            own.retain(|id| *id != stream.connection_id);
            if own.is_empty() {
                index.by_worker.remove(&stream.worker_id);
            }
        }
        index.departed.push((stream.worker_id.clone(), stream.connection_id));
        self.count(&index);
        drop(index);
        self.departure.notify_one();
        self.narrow.left_by(stream);
        self.slots_ended(stream);
        true
    }

    fn count(&self, index: &Index) {
        self.metrics.streams_open.set(i64::try_from(index.streams.len()).unwrap_or(i64::MAX));
    }

    /// Tells the streams that tasks are for, all or a few of them first, and for each one of the calls that wait.
    /// Where a stream with slots takes it, no call is woken for it.
    pub fn announce(&self, tasks: &[Announcement]) {
        self.assign_or_wake(tasks);
        let to_all: Vec<_> = tasks.iter().filter(|task| !self.offer_to_few(task)).collect();
        self.offer_to_all(&to_all);
    }

    /// The same for tasks that were told before: all are told.
    pub(super) fn announce_again(&self, tasks: &[Announcement]) {
        self.assign_or_wake(tasks);
        self.offer_to_all(&tasks.iter().collect::<Vec<_>>());
    }

    fn assign_or_wake(&self, tasks: &[Announcement]) {
        for task in tasks {
            if !self.assign(task) {
                self.waiters.wake_one(&task.push.task);
            }
        }
    }

    /// Offers tasks to all whom they concern. Tasks that concern the same streams go to one stream after the other,
    /// each of which is looked up in memory once for all of them.
    pub(super) fn offer_to_all(&self, tasks: &[&Announcement]) {
        let now = std::time::Instant::now();
        let mut told = 0;
        for alike in tasks.chunk_by(|one, other| one.concerns_the_same(other)) {
            for stream in self.concerned(alike[0]) {
                told += self.offer(&stream, alike, now);
            }
        }
        self.count_announcements(told);
    }

    /// Offers tasks to one stream; of how many its worker is told.
    pub(super) fn offer(
        &self,
        stream: &Stream,
        tasks: &[&Announcement],
        now: std::time::Instant,
    ) -> usize {
        let (told, held_back) = stream.offer(tasks, now);
        if held_back && stream.wants_more() {
            self.refill_one(stream.connection_id);
        }
        told
    }

    /// How many streams a task may concern, and up to `count` of them from a place in their order on.
    pub(super) fn some_concerned(
        &self,
        task: &Announcement,
        from: usize,
        count: usize,
    ) -> (usize, Vec<Arc<Stream>>) {
        let index = self.index();
        let codebase = &task.push.task.codebase_id;
        let streams = if is_for_all(codebase) {
            Some(&index.streams)
        } else {
            index.by_codebase.get(codebase)
        };
        let Some(streams) = streams.filter(|streams| !streams.is_empty()) else {
            return (0, Vec::new());
        };
        let all = streams.len();
        let some = streams.values().cycle().skip(from % all).take(count.min(all));
        (all, some.cloned().collect())
    }

    pub(super) fn concerned(&self, task: &Announcement) -> Vec<Arc<Stream>> {
        let index = self.index();
        let codebase = &task.push.task.codebase_id;
        if let Some(worker) = &task.push.task.target_worker_id {
            return WorkerId::parse(worker).map(|id| index.of_worker(&id)).unwrap_or_default();
        }
        if is_for_all(codebase) {
            return index.streams.values().cloned().collect();
        }
        index.by_codebase.get(codebase).into_iter().flat_map(HashMap::values).cloned().collect()
    }

    /// Counts tasks that a worker was told of.
    pub fn count_announcements(&self, told: usize) {
        self.metrics.announcements.inc_by(told as u64);
    }

    /// Counts a statement that read backlogs.
    pub fn count_backlog_read(&self) {
        self.metrics.backlog_reads.inc();
    }

    /// A worker asked for a task: it has read its stream as far as that. Or for whatever is best. False:
    /// its stream is not here.
    pub fn asked(&self, worker: &WorkerId, asked: Asked) -> bool {
        let now = std::time::Instant::now();
        let streams = self.index().of_worker(worker);
        for stream in &streams {
            match asked {
                Asked::Task(task) => stream.prove(task, now),
                Asked::Best => stream.asked_for_the_best(now),
            }
        }
        !streams.is_empty()
    }

    /// A worker acted on a task that it may have been told of: its window has room for another.
    pub fn acted(&self, worker: &WorkerId, task: TaskId) {
        let streams = self.index().of_worker(worker);
        for stream in streams {
            if stream.settle(task) {
                self.refill_one(stream.connection_id);
            }
        }
    }

    /// A worker could not claim a task because somebody had its row locked: the task may stay claimable,
    /// and is to be told again soon.
    pub fn missed(&self, worker: &WorkerId, task: TaskId) {
        let streams = self.index().of_worker(worker);
        for stream in streams {
            stream.hasten(task);
            if stream.wants_more() {
                self.refill_one(stream.connection_id);
            }
        }
    }

    /// A worker may not claim a task that it has heard of: the task is to be offered to others soon, and is news
    /// to this one should it be for it again.
    pub fn declined(&self, worker: &WorkerId, task: TaskId) {
        self.narrow.hasten(task);
        let streams = self.index().of_worker(worker);
        for stream in streams {
            if stream.unsay(task) {
                self.refill_one(stream.connection_id);
            }
        }
    }

    /// Sends a worker, if it is connected here, a frame of its own.
    pub fn deliver(&self, worker: &WorkerId, frame: &Bytes) {
        for stream in self.index().of_worker(worker) {
            stream.deliver(frame.clone());
        }
    }

    /// Routes a stream anew.
    pub fn reroute(&self, stream: &Stream, routing: &Routing) {
        let mut index = self.index();
        if let Some(before) = stream.reroute(routing)
            && let Some(stream) = index.streams.get(&stream.connection_id).cloned()
        {
            index.remove(stream.connection_id, &before.codebases);
            index.add(&stream, &routing.codebases);
        }
    }

    /// Ends a stream with its reason. One whose peer takes nothing is gone at once: nobody would come
    /// to read the reason.
    pub fn end(&self, stream: &Stream, why: End) {
        if why == End::TooSlow && !self.unsubscribe(stream) {
            return;
        }
        self.metrics.stream_ended(why.code());
        stream.close_slots();
        stream.mailbox.close(why.frame());
    }

    /// Ends all streams, spread evenly over `window`: their workers do not come back all at once.
    pub async fn drain(&self, window: Duration) {
        self.errands.close();
        let streams = self.streams();
        let begun = Instant::now();
        let count = u32::try_from(streams.len()).unwrap_or(u32::MAX);
        for (n, stream) in (1..).zip(streams) {
            self.end(&stream, End::Draining);
            if n < count {
                tokio::time::sleep_until(begun + window.mul_f64(f64::from(n) / f64::from(count)))
                    .await;
            }
        }
    }

    /// All streams, in no order.
    pub(super) fn streams(&self) -> Vec<Arc<Stream>> {
        self.index().streams.values().cloned().collect()
    }

    /// Connections that ended, once there are some.
    pub async fn departed(&self) -> Vec<(WorkerId, ConnectionId)> {
        loop {
            let (departed, more) = {
                let mut index = self.index();
                let count = index.departed.len().min(DEPARTURES_MAX);
                let departed: Vec<_> = index.departed.drain(..count).collect();
                (departed, !index.departed.is_empty())
            };
            if more {
                self.departure.notify_one();
            }
            if !departed.is_empty() {
                return departed;
            }
            self.departure.notified().await;
        }
    }

    /// Has the presence of connections ended that are no streams here.
    pub fn depart(&self, connections: Vec<(WorkerId, ConnectionId)>) {
        let mut index = self.index();
        for (worker, connection) in connections {
            if !index.streams.contains_key(&connection) {
                index.departed.push((worker, connection));
            }
        }
        drop(index);
        self.departure.notify_one();
    }

    /// Whether nobody is here who wants to hear of tasks.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.is_empty() && self.waiters.is_empty()
    }

    /// Whether a stream is open still.
    pub(super) fn has(&self, stream: &Stream) -> bool {
        self.index().streams.contains_key(&stream.connection_id)
    }

    /// How many streams are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.index().streams.len()
    }

    /// Whether no stream is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
