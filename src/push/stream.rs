//! One open stream: what its worker was told of, and what waits for it in Postgres.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;

use super::frames::TaskFrames;
use super::mailbox::Mailbox;
use super::window::{Verdict, Window};
use crate::domain::{ConnectionId, Routing, TaskId, WorkerId};
use crate::store::{PushTask, Ready};

/// A claimable task with its frames, ready for any number of streams.
#[derive(Debug)]
pub struct Announcement {
    pub(super) push: PushTask,
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
        Ready { id: self.push.task.id, xid: self.push.ready_xid }
    }

    fn priority(&self) -> i32 {
        self.push.task.priority
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
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    routing: Routing,
    window: Window,
    waiting: Waiting,
}

/// What is held back: it stays in Postgres, and is read from there when there is room.
#[derive(Debug)]
struct Waiting {
    /// Grows with each task that is held back.
    held_back: u64,
    /// `held_back` as it was when the backlog was last read to its end.
    settled: u64,
    /// The highest priority of what is held back. A new task that matters no more waits behind it,
    /// or arrivals would starve the backlog.
    behind: Option<i32>,
    /// The same, of what was held back since the present read of the backlog began.
    behind_next: Option<i32>,
}

impl Waiting {
    fn hold(&mut self, priority: Option<i32>) {
        self.held_back += 1;
        self.behind = self.behind.max(priority);
        self.behind_next = self.behind_next.max(priority);
    }

    fn is_any(&self) -> bool {
        self.held_back > self.settled
    }

    fn goes_before(&self, priority: i32) -> bool {
        self.is_any() && self.behind >= Some(priority)
    }
}

/// What became of an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// The worker is told.
    Told,
    /// It is not for this worker, or no news.
    Passed,
    /// It waits in Postgres, for its turn or for room.
    HeldBack,
    /// It waits for the socket to take what is on its way.
    SocketIsBusy,
}

/// Where an offer comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    /// A task that has just become claimable.
    Live,
    /// The backlog, best first.
    Backlog,
}

/// A stream before its backlog is read: what is held back in between is not forgotten.
#[derive(Clone, Copy, Debug)]
pub struct Refill(u64);

impl Stream {
    /// A stream that waits for its backlog: nothing goes before that.
    pub(super) fn new(
        connection_id: ConnectionId,
        routing: Routing,
        window_size: usize,
        wants_task: bool,
    ) -> Self {
        let waiting =
            Waiting { held_back: 1, settled: 0, behind: Some(i32::MAX), behind_next: None };
        Self {
            connection_id,
            worker_id: routing.worker_id.clone(),
            mailbox: Mailbox::default(),
            wants_task,
            state: Mutex::new(State { routing, window: Window::new(window_size), waiting }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the worker of a task that has just become claimable.
    pub(super) fn offer(&self, task: &Announcement, now: Instant) -> Offer {
        self.offer_from(From::Live, task, now)
    }

    fn offer_from(&self, from: From, task: &Announcement, now: Instant) -> Offer {
        let mut state = self.state();
        if !state.routing.matches(task.push.task.routing()) {
            return Offer::Passed;
        }
        let (ready, priority) = (task.ready(), task.priority());
        match state.window.consider(ready, priority, now) {
            Verdict::Known => return Offer::Passed,
            // No news, and the worker has not read what it was told since.
            Verdict::Again if !self.mailbox.is_empty() => return Offer::Passed,
            Verdict::Announce if from == From::Live && state.waiting.goes_before(priority) => {
                state.waiting.hold(Some(priority));
                return Offer::HeldBack;
            }
            Verdict::HoldBack => {
                state.waiting.hold(Some(priority));
                return Offer::HeldBack;
            }
            Verdict::Announce | Verdict::Again | Verdict::Anew => {}
        }
        let frames = [task.frames.available.clone(), task.frames.task.clone()];
        let frames = if self.wants_task { &frames[..] } else { &frames[..1] };
        if !self.mailbox.put(frames) {
            state.waiting.hold(Some(priority));
            return Offer::SocketIsBusy;
        }
        let bytes = frames.iter().map(Bytes::len).sum();
        state.window.note(ready, priority, bytes, now);
        Offer::Told
    }

    /// To be called before the backlog is read from Postgres.
    pub(super) fn refill_begin(&self) -> Refill {
        let mut state = self.state();
        state.waiting.behind_next = None;
        Refill(state.waiting.held_back)
    }

    /// Tells the worker of its backlog, best first. `is_all`: there is no more than this. How many
    /// it was told of, and whether to read again at once.
    pub(super) fn refill(
        &self,
        before: Refill,
        backlog: &[Announcement],
        is_all: bool,
    ) -> (usize, bool) {
        let now = Instant::now();
        let offers: Vec<_> =
            backlog.iter().map(|task| self.offer_from(From::Backlog, task, now)).collect();
        let count = |what| offers.iter().filter(|offer| **offer == what).count();
        let (told, held) = (count(Offer::Told), count(Offer::HeldBack));
        let is_busy = count(Offer::SocketIsBusy) > 0;

        let mut state = self.state();
        let waiting = &mut state.waiting;
        let held_live = waiting.held_back > before.0 + (held + count(Offer::SocketIsBusy)) as u64;
        if !is_all {
            waiting.hold(backlog.last().map(Announcement::priority));
        }
        if waiting.held_back == before.0 {
            waiting.settled = before.0;
        }
        waiting.behind = waiting.behind_next.filter(|_| waiting.is_any());
        let again = waiting.is_any() && !is_busy && (told > 0 || held_live);
        (told, again && state.window.has_room())
    }

    /// Notes that there may be more in Postgres than the worker was told of.
    pub(super) fn expect_more(&self) {
        self.state().waiting.hold(None);
    }

    /// Whether more waits in Postgres, and there is room for it.
    pub(super) fn wants_more(&self) -> bool {
        let state = self.state();
        state.waiting.is_any() && state.window.has_room()
    }

    /// The worker acted on a task; whether there is room for more now that waits.
    pub(super) fn settle(&self, task: TaskId) -> bool {
        let settled = self.state().window.settle(task);
        settled && self.wants_more()
    }

    /// The worker could not claim a task because its row was locked.
    pub(super) fn hasten(&self, task: TaskId) {
        self.state().window.hasten(task, Instant::now());
    }

    /// What is to be looked up: all of a full window while more waits, and what is to be repeated.
    pub(super) fn doubts(&self, now: Instant) -> Doubts {
        let mut state = self.state();
        let repeats = state.window.to_repeat(now);
        let check = if state.waiting.is_any() && !state.window.has_room() {
            state.window.outstanding().collect()
        } else {
            repeats.clone()
        };
        Doubts { check, repeats }
    }

    /// Takes what was looked up and can no longer be claimed out of the window.
    pub(super) fn clear(
        &self,
        asked: &std::collections::HashSet<Ready>,
        still: &std::collections::HashSet<Ready>,
    ) {
        let mut state = self.state();
        let gone: Vec<_> = state
            .window
            .outstanding()
            .filter(|ready| asked.contains(ready) && !still.contains(ready))
            .collect();
        for ready in gone {
            state.window.settle(ready.id);
        }
    }

    /// How it is routed.
    pub(super) fn routing(&self) -> Routing {
        self.state().routing.clone()
    }

    /// Routes it anew; how it was routed before, if that was different.
    pub(super) fn reroute(&self, routing: &Routing) -> Option<Routing> {
        let mut state = self.state();
        (state.routing != *routing).then(|| std::mem::replace(&mut state.routing, routing.clone()))
    }
}

/// What a stream is not sure of any more.
#[derive(Debug)]
pub(super) struct Doubts {
    /// To be looked up.
    pub(super) check: Vec<Ready>,
    /// To be told again if it can still be claimed.
    pub(super) repeats: Vec<Ready>,
}
