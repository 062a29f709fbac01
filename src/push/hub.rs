//! The streams of this replica, and which of them a task concerns.
//!
//! An index by codebase makes the cost of a task that of the streams that match, not of the streams
//! there are. Everything here may be lost: a stream that reconnects elsewhere is rebuilt from
//! Postgres.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Notify;

use super::frames::{End, TaskFrames};
use super::mailbox::Mailbox;
use super::window::{Verdict, Window};
use crate::domain::routing::is_for_all;
use crate::domain::{ConnectionId, Routing, TaskId, WorkerId};
use crate::metrics::Metrics;
use crate::store::{PushTask, Ready};

/// A claimable task with its frames, ready for any number of streams.
#[derive(Debug)]
pub struct Announcement {
    push: PushTask,
    frames: TaskFrames,
}

impl Announcement {
    /// Makes the frames.
    #[must_use]
    pub fn new(push: PushTask) -> Self {
        let frames = TaskFrames::new(&push);
        Self { push, frames }
    }

    /// Which announcement of which task it is.
    #[must_use]
    pub fn ready(&self) -> Ready {
        Ready {
            id: self.push.task.id,
            xid: self.push.ready_xid,
        }
    }
}

/// One open stream.
#[derive(Debug)]
pub struct Stream {
    /// Names this connection.
    pub connection_id: ConnectionId,
    /// Whose it is.
    pub worker_id: WorkerId,
    /// What its socket has not taken yet.
    pub mailbox: Mailbox,
    /// `?events=task_available` leaves the `task` events out.
    wants_task: bool,
    state: Mutex<StreamState>,
}

#[derive(Debug)]
struct StreamState {
    routing: Routing,
    window: Window,
    /// Grows with each task that found no room.
    held_back: u64,
    /// `held_back` as it was when the backlog was last read to its end: less means that more waits.
    settled: u64,
}

/// The state of a stream before its backlog is read: compared with after, so that what is held back
/// in between is not forgotten.
#[derive(Clone, Copy, Debug)]
pub struct Refill(u64);

impl Stream {
    fn state(&self) -> MutexGuard<'_, StreamState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the stream of a task, if it is for its worker, news, and there is room.
    fn offer(&self, task: &Announcement, now: Instant) -> bool {
        let mut state = self.state();
        if !state.routing.matches(task.push.task.routing()) {
            return false;
        }
        let (ready, priority) = (task.ready(), task.push.task.priority);
        match state.window.consider(ready, priority, now) {
            Verdict::Known => return false,
            Verdict::HoldBack => {
                state.held_back += 1;
                return false;
            }
            Verdict::Announce => {}
        }
        let frames = [task.frames.available.clone(), task.frames.task.clone()];
        let frames = if self.wants_task {
            &frames[..]
        } else {
            &frames[..1]
        };
        if !self.mailbox.put(frames) {
            state.held_back += 1;
            return false;
        }
        state
            .window
            .note(ready, priority, frames.iter().map(Bytes::len).sum(), now);
        true
    }

    /// To be called before the backlog is read from Postgres.
    #[must_use]
    pub fn refill_begin(&self) -> Refill {
        Refill(self.state().held_back)
    }

    /// Tells the stream of its backlog. `is_all`: there is no more than this.
    pub fn refill(&self, before: Refill, backlog: &[Announcement], is_all: bool) -> usize {
        let now = Instant::now();
        let held_back_then = self.state().held_back;
        let told = backlog.iter().filter(|task| self.offer(task, now)).count();
        let mut state = self.state();
        if is_all && held_back_then == before.0 && state.held_back == before.0 {
            state.settled = before.0;
        } else if !is_all {
            state.held_back += 1;
        }
        told
    }

    /// Whether more waits in Postgres than the stream was told of.
    fn waits(&self) -> bool {
        let state = self.state();
        state.held_back > state.settled
    }
}

/// All streams of this replica.
#[derive(Debug)]
pub struct Hub {
    inner: Mutex<Inner>,
    attention: Notify,
    departure: Notify,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Inner {
    streams: HashMap<ConnectionId, Arc<Stream>>,
    by_codebase: HashMap<String, HashSet<ConnectionId>>,
    /// More than one only until the older one's end has come through Postgres.
    by_worker: HashMap<WorkerId, Vec<ConnectionId>>,
    /// Streams to be looked at; true: their presence and routing too, not only their backlog.
    attention: HashMap<ConnectionId, bool>,
    /// Connections that ended, and whose presence is to end.
    departed: Vec<ConnectionId>,
}

impl Hub {
    /// A hub without streams.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            inner: Mutex::default(),
            attention: Notify::new(),
            departure: Notify::new(),
            metrics,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
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
        first: Bytes,
    ) -> Arc<Stream> {
        let stream = Arc::new(Stream {
            connection_id,
            worker_id: routing.worker_id.clone(),
            mailbox: Mailbox::default(),
            wants_task,
            state: Mutex::new(StreamState {
                routing: routing.clone(),
                window: Window::new(window_size),
                held_back: 1,
                settled: 0,
            }),
        });
        stream.mailbox.put(&[first]);
        let mut inner = self.inner();
        inner.index(connection_id, &routing.codebases);
        inner
            .by_worker
            .entry(routing.worker_id)
            .or_default()
            .push(connection_id);
        inner.streams.insert(connection_id, Arc::clone(&stream));
        // What changed since its row was written told nobody here: so look at presence and routing
        // as well.
        inner.attention.insert(connection_id, true);
        self.metrics
            .streams_open
            .set(i64::try_from(inner.streams.len()).unwrap_or(i64::MAX));
        drop(inner);
        self.attention.notify_one();
        stream
    }

    /// Removes a stream whose connection is gone; its presence follows (see `presence`).
    pub fn unsubscribe(&self, stream: &Stream) {
        let codebases = stream.state().routing.codebases.clone();
        let mut inner = self.inner();
        if inner.streams.remove(&stream.connection_id).is_none() {
            return;
        }
        inner.unindex(stream.connection_id, &codebases);
        inner.attention.remove(&stream.connection_id);
        if let Some(own) = inner.by_worker.get_mut(&stream.worker_id) {
            own.retain(|id| *id != stream.connection_id);
            if own.is_empty() {
                inner.by_worker.remove(&stream.worker_id);
            }
        }
        inner.departed.push(stream.connection_id);
        self.metrics
            .streams_open
            .set(i64::try_from(inner.streams.len()).unwrap_or(i64::MAX));
        drop(inner);
        self.departure.notify_one();
    }

    /// Tells every stream that a task is for. How many were told.
    pub fn announce(&self, task: &Announcement) -> usize {
        let codebase = &task.push.task.codebase_id;
        let streams: Vec<Arc<Stream>> = {
            let inner = self.inner();
            if let Some(worker) = &task.push.task.target_worker_id {
                WorkerId::parse(worker)
                    .ok()
                    .and_then(|worker| inner.by_worker.get(&worker))
                    .into_iter()
                    .flatten()
                    .filter_map(|id| inner.streams.get(id).cloned())
                    .collect()
            } else if is_for_all(codebase) {
                inner.streams.values().cloned().collect()
            } else {
                inner
                    .by_codebase
                    .get(codebase)
                    .into_iter()
                    .flatten()
                    .filter_map(|id| inner.streams.get(id).cloned())
                    .collect()
            }
        };
        let now = Instant::now();
        let told = streams
            .iter()
            .filter(|stream| stream.offer(task, now))
            .count();
        self.metrics.announcements.inc_by(told as u64);
        told
    }

    /// Counts what a backlog told.
    pub fn count_announcements(&self, told: usize) {
        self.metrics.announcements.inc_by(told as u64);
    }

    /// A worker acted on a task that it may have been told of: its window has room for another.
    pub fn acted(&self, worker: &WorkerId, task: TaskId) {
        let mut inner = self.inner();
        let mut wake = false;
        for stream in inner.of_worker(worker) {
            let mut state = stream.state();
            let freed = state.window.settle(task);
            if freed && state.held_back > state.settled && state.window.has_room() {
                drop(state);
                inner.attention.entry(stream.connection_id).or_insert(false);
                wake = true;
            }
        }
        drop(inner);
        if wake {
            self.attention.notify_one();
        }
    }

    /// Sends a worker, if it is connected here, a frame of its own.
    pub fn deliver(&self, worker: &WorkerId, frame: &Bytes) {
        for stream in self.inner().of_worker(worker) {
            stream.mailbox.put(std::slice::from_ref(frame));
        }
    }

    /// Has the streams of some workers looked at, presence and routing too.
    pub fn review_workers(&self, workers: &HashSet<WorkerId>) {
        self.pay_attention(true, |inner| {
            workers
                .iter()
                .filter_map(|id| inner.by_worker.get(id))
                .flatten()
                .copied()
                .collect()
        });
    }

    /// Has all streams looked at, presence and routing too.
    pub fn review_all(&self) {
        self.pay_attention(true, |inner| inner.streams.keys().copied().collect());
    }

    /// Has the backlog read again of all streams, or of those of some codebases.
    pub fn refill(&self, codebases: Option<&HashSet<String>>) {
        self.pay_attention(false, |inner| match codebases {
            Some(codebases) if !codebases.iter().any(|id| is_for_all(id)) => codebases
                .iter()
                .filter_map(|id| inner.by_codebase.get(id))
                .flatten()
                .copied()
                .collect(),
            _ => inner.streams.keys().copied().collect(),
        });
    }

    /// Has the backlog of one stream read (again).
    pub fn refill_one(&self, connection: ConnectionId) {
        self.pay_attention(false, |inner| {
            inner
                .streams
                .contains_key(&connection)
                .then_some(connection)
                .into_iter()
                .collect()
        });
    }

    fn pay_attention(&self, review: bool, to: impl FnOnce(&Inner) -> Vec<ConnectionId>) {
        let mut inner = self.inner();
        for id in to(&inner) {
            let entry = inner.attention.entry(id).or_insert(review);
            *entry |= review;
            // Whatever a window says now, there may be more than it was told of.
            if let Some(stream) = inner.streams.get(&id) {
                stream.state().held_back += 1;
            }
        }
        let any = !inner.attention.is_empty();
        drop(inner);
        if any {
            self.attention.notify_one();
        }
    }

    /// Up to `max` streams that want to be looked at, each with whether to review it; waits for one.
    pub async fn next_attention(&self, max: usize) -> Vec<(Arc<Stream>, bool)> {
        loop {
            let (batch, more) = {
                let mut inner = self.inner();
                let ids: Vec<_> = inner.attention.keys().take(max).copied().collect();
                let batch: Vec<_> = ids
                    .into_iter()
                    .filter_map(|id| {
                        let review = inner.attention.remove(&id)?;
                        Some((Arc::clone(inner.streams.get(&id)?), review))
                    })
                    .collect();
                (batch, !inner.attention.is_empty())
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
        let mut inner = self.inner();
        for (stream, review) in streams {
            if inner.streams.contains_key(&stream.connection_id) {
                *inner
                    .attention
                    .entry(stream.connection_id)
                    .or_insert(*review) |= review;
            }
        }
        drop(inner);
        self.attention.notify_one();
    }

    /// Routes a stream anew.
    pub fn reroute(&self, stream: &Stream, routing: &Routing) {
        let mut inner = self.inner();
        let before = {
            let mut state = stream.state();
            if state.routing == *routing {
                return;
            }
            std::mem::replace(&mut state.routing, routing.clone())
        };
        if inner.streams.contains_key(&stream.connection_id) {
            inner.unindex(stream.connection_id, &before.codebases);
            inner.index(stream.connection_id, &routing.codebases);
        }
    }

    /// Ends a stream with its reason.
    pub fn end(&self, stream: &Stream, why: End) {
        self.metrics.stream_ended(why.code());
        stream.mailbox.close(why.frame());
    }

    /// Ends all streams, spread evenly over `window`: their workers do not come back all at once.
    pub async fn drain(&self, window: Duration) {
        let streams: Vec<_> = self.inner().streams.values().cloned().collect();
        let Ok(count) = u32::try_from(streams.len()) else {
            return;
        };
        for stream in streams {
            self.end(&stream, End::Draining);
            tokio::time::sleep(window / count).await;
        }
    }

    /// What is outstanding in windows that are full while more waits, and what is to be repeated.
    pub fn doubtful(&self, max: usize) -> Doubtful {
        let streams: Vec<_> = self.inner().streams.values().cloned().collect();
        let now = Instant::now();
        let mut doubtful = Doubtful::default();
        for stream in streams {
            let mut state = stream.state();
            let repeats = state.window.to_repeat(now);
            let waits = state.held_back > state.settled;
            let check: Vec<_> = if waits && !state.window.has_room() {
                state.window.outstanding().collect()
            } else {
                repeats.clone()
            };
            doubtful.repeats.extend(repeats);
            drop(state);
            if !check.is_empty() && doubtful.tasks.len() < max {
                doubtful.tasks.extend(check);
                doubtful.streams.push(stream);
            }
        }
        doubtful
    }

    /// Takes what can no longer be claimed out of some windows; has those read their backlog that
    /// have room for it now.
    pub fn settle(&self, doubtful: &Doubtful, still_claimable: &HashSet<TaskId>) {
        for stream in &doubtful.streams {
            let mut state = stream.state();
            let gone: Vec<_> = state
                .window
                .outstanding()
                .filter(|id| doubtful.tasks.contains(id) && !still_claimable.contains(id))
                .collect();
            for id in gone {
                state.window.settle(id);
            }
            let has_room = state.window.has_room();
            drop(state);
            if has_room && stream.waits() {
                self.refill_one(stream.connection_id);
            }
        }
    }

    /// Connections that ended, once there are some.
    pub async fn departed(&self) -> Vec<ConnectionId> {
        loop {
            let departed = std::mem::take(&mut self.inner().departed);
            if !departed.is_empty() {
                return departed;
            }
            self.departure.notified().await;
        }
    }

    /// Puts connections back whose presence could not be ended.
    pub fn departed_again(&self, connections: Vec<ConnectionId>) {
        self.inner().departed.extend(connections);
        self.departure.notify_one();
    }

    /// All streams, as presence rows are made of them.
    #[must_use]
    pub fn presences(&self) -> Vec<(WorkerId, ConnectionId)> {
        let inner = self.inner();
        inner
            .streams
            .values()
            .map(|s| (s.worker_id.clone(), s.connection_id))
            .collect()
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

/// What the hub is not sure of any more.
#[derive(Debug, Default)]
pub struct Doubtful {
    /// Tasks to look up.
    pub tasks: HashSet<TaskId>,
    /// Those of them that are to be told again if they can still be claimed.
    pub repeats: HashSet<TaskId>,
    streams: Vec<Arc<Stream>>,
}

impl Inner {
    fn index(&mut self, connection: ConnectionId, codebases: &[String]) {
        for codebase in codebases {
            self.by_codebase
                .entry(codebase.clone())
                .or_default()
                .insert(connection);
        }
    }

    fn unindex(&mut self, connection: ConnectionId, codebases: &[String]) {
        for codebase in codebases {
            if let Some(set) = self.by_codebase.get_mut(codebase) {
                set.remove(&connection);
                if set.is_empty() {
                    self.by_codebase.remove(codebase);
                }
            }
        }
    }

    fn of_worker(&self, worker: &WorkerId) -> Vec<Arc<Stream>> {
        let ids = self.by_worker.get(worker).into_iter().flatten();
        ids.filter_map(|id| self.streams.get(id).cloned()).collect()
    }
}
