//! The streams of this replica, and which of them a task concerns.
//!
//! An index by codebase makes the cost of a task that of the streams that match, not of the streams
//! there are. Everything here may be lost: a stream that reconnects elsewhere is rebuilt from
//! Postgres.
//!
//! Locks are taken in one order: the hub's, a stream's, its mailbox's.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::assign::Errands;
use super::attention::Attention;
use super::frames::End;
use super::narrow::Narrow;
use super::stream::{Announcement, Offer, Stream};
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
    inner: Mutex<Inner>,
    attention: Notify,
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

#[derive(Debug, Default)]
pub(super) struct Inner {
    streams: HashMap<ConnectionId, Arc<Stream>>,
    /// The streams themselves: who announces need not look each one up.
    by_codebase: HashMap<String, HashMap<ConnectionId, Arc<Stream>>>,
    /// More than one only until the older one's end has come through Postgres.
    by_worker: HashMap<WorkerId, Vec<ConnectionId>>,
    attention: Attention,
    /// Connections that ended, and whose presence is to end.
    departed: Vec<(WorkerId, ConnectionId)>,
}

impl Hub {
    /// A hub without streams.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>, max_age: Duration, fanout: Fanout) -> Self {
        Self {
            inner: Mutex::default(),
            attention: Notify::new(),
            departure: Notify::new(),
            max_age,
            errands: Errands::default(),
            waiters: Arc::default(),
            narrow: Narrow::new(fanout),
            metrics,
        }
    }

    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut inner = self.inner();
        inner.index(&stream, &codebases);
        inner.by_worker.entry(worker_id).or_default().push(connection_id);
        inner.streams.insert(connection_id, Arc::clone(&stream));
        // What changed since its row was written told nobody here: so presence and routing are
        // looked at as well.
        inner.attention.ask(connection_id, true);
        self.count(&inner);
        drop(inner);
        self.attention.notify_one();
        stream
    }

    /// Removes a stream whose connection is gone; its presence follows (see `presence`). False: it
    /// was removed before.
    pub fn unsubscribe(&self, stream: &Stream) -> bool {
        let mut inner = self.inner();
        if inner.streams.remove(&stream.connection_id).is_none() {
            return false;
        }
        inner.unindex(stream.connection_id, &stream.routing().codebases);
        inner.attention.forget(stream.connection_id);
        if let Some(own) = inner.by_worker.get_mut(&stream.worker_id) {
            own.retain(|id| *id != stream.connection_id);
            if own.is_empty() {
                inner.by_worker.remove(&stream.worker_id);
            }
        }
        inner.departed.push((stream.worker_id.clone(), stream.connection_id));
        self.count(&inner);
        drop(inner);
        self.departure.notify_one();
        self.narrow.left_by(stream);
        self.slots_ended(stream);
        true
    }

    fn count(&self, inner: &Inner) {
        self.metrics.streams_open.set(i64::try_from(inner.streams.len()).unwrap_or(i64::MAX));
    }

    /// Tells the streams that a task is for, all or a few of them first, and one of the calls that wait.
    /// Where a stream with slots takes it, no call is woken for it.
    pub fn announce(&self, task: &Announcement) {
        if !self.assign(task) {
            self.waiters.wake_one(&task.push.task);
        }
        if !self.offer_to_few(task) {
            self.offer_to_all(task);
        }
    }

    /// The same for a task that was told before: all are told.
    pub(super) fn announce_again(&self, task: &Announcement) {
        if !self.assign(task) {
            self.waiters.wake_one(&task.push.task);
        }
        self.offer_to_all(task);
    }

    pub(super) fn offer_to_all(&self, task: &Announcement) {
        let now = std::time::Instant::now();
        let mut told = 0;
        for stream in self.concerned(task) {
            told += usize::from(self.offer(&stream, task, now));
        }
        self.count_announcements(told);
    }

    /// Offers a task to one stream; whether its worker is told.
    pub(super) fn offer(
        &self,
        stream: &Stream,
        task: &Announcement,
        now: std::time::Instant,
    ) -> bool {
        match stream.offer(task, now) {
            Offer::Told => return true,
            Offer::HeldBack if stream.wants_more() => self.refill_one(stream.connection_id),
            _ => {}
        }
        false
    }

    /// How many streams a task may concern, and up to `count` of them from a place in their order on.
    pub(super) fn some_concerned(
        &self,
        task: &Announcement,
        from: usize,
        count: usize,
    ) -> (usize, Vec<Arc<Stream>>) {
        let inner = self.inner();
        let codebase = &task.push.task.codebase_id;
        let streams = if is_for_all(codebase) {
            Some(&inner.streams)
        } else {
            inner.by_codebase.get(codebase)
        };
        let Some(streams) = streams.filter(|streams| !streams.is_empty()) else {
            return (0, Vec::new());
        };
        let all = streams.len();
        let some = streams.values().cycle().skip(from % all).take(count.min(all));
        (all, some.cloned().collect())
    }

    pub(super) fn concerned(&self, task: &Announcement) -> Vec<Arc<Stream>> {
        let inner = self.inner();
        let codebase = &task.push.task.codebase_id;
        if let Some(worker) = &task.push.task.target_worker_id {
            return WorkerId::parse(worker).map(|id| inner.of_worker(&id)).unwrap_or_default();
        }
        if is_for_all(codebase) {
            return inner.streams.values().cloned().collect();
        }
        inner.by_codebase.get(codebase).into_iter().flat_map(HashMap::values).cloned().collect()
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
        let streams = self.inner().of_worker(worker);
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
        let streams = self.inner().of_worker(worker);
        for stream in streams {
            if stream.settle(task) {
                self.refill_one(stream.connection_id);
            }
        }
    }

    /// A worker could not claim a task because somebody had its row locked: the task may stay claimable,
    /// and is to be told again soon.
    pub fn missed(&self, worker: &WorkerId, task: TaskId) {
        let streams = self.inner().of_worker(worker);
        for stream in streams {
            stream.hasten(task);
            if stream.wants_more() {
                self.refill_one(stream.connection_id);
            }
        }
    }

    /// A worker may not claim a task that it has heard of: the task is to be offered to others soon.
    pub fn declined(&self, task: TaskId) {
        self.narrow.hasten(task);
    }

    /// Sends a worker, if it is connected here, a frame of its own.
    pub fn deliver(&self, worker: &WorkerId, frame: &Bytes) {
        for stream in self.inner().of_worker(worker) {
            stream.deliver(frame.clone());
        }
    }

    /// Has the streams of some workers looked at, presence and routing too.
    pub fn review_workers(&self, workers: &HashSet<WorkerId>) {
        self.waiters.reroute(Some(workers));
        self.pay_attention(true, |inner| {
            workers.iter().filter_map(|id| inner.by_worker.get(id)).flatten().copied().collect()
        });
    }

    /// Has all streams looked at, presence and routing too.
    pub fn review_all(&self) {
        self.waiters.reroute(None);
        self.pay_attention(true, |inner| inner.streams.keys().copied().collect());
    }

    /// Has the backlog read again of all streams, or of those of some codebases.
    pub fn refill(&self, codebases: Option<&HashSet<String>>) {
        let named = codebases.filter(|ids| !ids.iter().any(|id| is_for_all(id)));
        self.waiters.wake_all(named);
        self.pay_attention(false, |inner| match named {
            Some(codebases) => codebases
                .iter()
                .filter_map(|id| inner.by_codebase.get(id))
                .flat_map(HashMap::keys)
                .copied()
                .collect(),
            None => inner.streams.keys().copied().collect(),
        });
    }

    /// Has the backlog of one stream read (again).
    pub fn refill_one(&self, connection: ConnectionId) {
        self.pay_attention(false, |_| vec![connection]);
    }

    fn pay_attention(&self, review: bool, to: impl FnOnce(&Inner) -> Vec<ConnectionId>) {
        let mut inner = self.inner();
        for id in to(&inner) {
            if let Some(stream) = inner.streams.get(&id) {
                stream.expect_more();
                inner.attention.ask(id, review);
            }
        }
        let wake = !inner.attention.is_empty();
        drop(inner);
        if wake {
            self.attention.notify_one();
        }
    }

    /// Up to `max` streams that want to be looked at, each with whether to review it; waits for one.
    pub async fn next_attention(&self, max: usize) -> Vec<(Arc<Stream>, bool)> {
        loop {
            let mut batch = Vec::new();
            let more = {
                let mut inner = self.inner();
                while batch.len() < max
                    && let Some((id, review)) = inner.attention.next()
                {
                    batch.extend(inner.streams.get(&id).map(|stream| (Arc::clone(stream), review)));
                }
                !inner.attention.is_empty()
            };
            if more {
                self.attention.notify_one();
            }
            if !batch.is_empty() {
                return batch;
            }
            self.attention.notified().await;
        }
    }

    /// Puts streams back whose look failed.
    pub fn again(&self, streams: &[(Arc<Stream>, bool)]) {
        for (stream, review) in streams {
            self.pay_attention(*review, |_| vec![stream.connection_id]);
        }
    }

    /// Routes a stream anew.
    pub fn reroute(&self, stream: &Stream, routing: &Routing) {
        let mut inner = self.inner();
        if let Some(before) = stream.reroute(routing)
            && let Some(stream) = inner.streams.get(&stream.connection_id).cloned()
        {
            inner.unindex(stream.connection_id, &before.codebases);
            inner.index(&stream, &routing.codebases);
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
        self.inner().streams.values().cloned().collect()
    }

    /// Connections that ended, once there are some.
    pub async fn departed(&self) -> Vec<(WorkerId, ConnectionId)> {
        loop {
            let (departed, more) = {
                let mut inner = self.inner();
                let count = inner.departed.len().min(DEPARTURES_MAX);
                let departed: Vec<_> = inner.departed.drain(..count).collect();
                (departed, !inner.departed.is_empty())
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
        let mut inner = self.inner();
        for (worker, connection) in connections {
            if !inner.streams.contains_key(&connection) {
                inner.departed.push((worker, connection));
            }
        }
        drop(inner);
        self.departure.notify_one();
    }

    /// Whether nobody is here who wants to hear of tasks.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.is_empty() && self.waiters.is_empty()
    }

    /// Whether a stream is open still.
    pub(super) fn has(&self, stream: &Stream) -> bool {
        self.inner().streams.contains_key(&stream.connection_id)
    }

    /// How many streams are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inner().streams.len()
    }

    /// Whether no stream is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Inner {
    fn index(&mut self, stream: &Arc<Stream>, codebases: &[String]) {
        for codebase in codebases {
            let streams = self.by_codebase.entry(codebase.clone()).or_default();
            streams.insert(stream.connection_id, Arc::clone(stream));
        }
    }

    fn unindex(&mut self, connection: ConnectionId, codebases: &[String]) {
        for codebase in codebases {
            if let Some(streams) = self.by_codebase.get_mut(codebase) {
                streams.remove(&connection);
                if streams.is_empty() {
                    self.by_codebase.remove(codebase);
                }
            }
        }
    }

    pub(super) fn of_worker(&self, worker: &WorkerId) -> Vec<Arc<Stream>> {
        let ids = self.by_worker.get(worker).into_iter().flatten();
        ids.filter_map(|id| self.streams.get(id).cloned()).collect()
    }
}
