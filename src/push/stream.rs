//! One open stream: what its worker was told of, and what waits for it in Postgres.

use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::announcement::Announcement;
use super::doubts::ASKED_LATELY;
use super::frames;
use super::mailbox::Mailbox;
use super::slots::Slots;
use super::unread::on_the_way;
use super::waiting::Waiting;
use super::window::{Offered, Verdict, Window};
use crate::domain::{ConnectionId, Routing, TaskId, WorkerId};
use crate::store::Ready;

/// A stream that is old enough to end and did not is old enough again after this long.
const AGE_TRY_AGAIN: Duration = Duration::from_mins(1);

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
    /// Its worker does not claim: tasks are claimed for it.
    pub has_slots: bool,
    /// Frames of the mailbox that have left, as far as that is known.
    pub(super) frames_left: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) routing: Routing,
    pub(super) window: Window,
    pub(super) waiting: Waiting,
    /// With slots: what its worker holds.
    pub(super) slots: Option<Box<Slots>>,
    /// Nothing more is announced: it is about to end.
    pub(super) is_retiring: bool,
    /// When it is old enough to end.
    pub(super) ages_at: Option<Instant>,
    /// Since when its worker has held no claim, as far as Postgres was asked.
    pub(super) rests_since: Option<Instant>,
    /// Its worker holds a claim, as far as Postgres was asked.
    is_busy: bool,
    /// When its worker asked for whatever is best, here.
    best_at: Option<Instant>,
    /// How much its socket had taken when it was last looked at, and since when that has been all.
    taken: Option<(u64, Instant)>,
}

impl State {
    /// Whether its worker may be about to hold what it asked for without reading.
    pub(super) fn asked_lately(&self, now: Instant) -> bool {
        self.best_at.is_some_and(|at| now.saturating_duration_since(at) < ASKED_LATELY)
    }

    fn hold_back(&mut self, priority: i32) -> Offer {
        self.waiting.hold(Some(priority));
        Offer::HeldBack
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

/// How well a worker would take a task. Lesser is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// It has not taken yet what it was told, or more waits for it already.
    pub(super) is_full: bool,
    /// It holds a claim.
    pub(super) is_busy: bool,
    /// What it was told of and has not acted on.
    outstanding: usize,
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
        slots: Option<usize>,
        ages_at: Option<Instant>,
    ) -> Self {
        let waiting =
            Waiting { held_back: 1, settled: 0, behind: Some(i32::MAX), behind_next: None };
        Self {
            connection_id,
            worker_id: routing.worker_id.clone(),
            mailbox: Mailbox::default(),
            wants_task,
            has_slots: slots.is_some(),
            frames_left: AtomicU64::new(0),
            state: Mutex::new(State {
                routing,
                window: Window::new(window_size),
                waiting,
                slots: slots.map(|size| Box::new(Slots::new(size))),
                is_retiring: false,
                ages_at,
                rests_since: None,
                is_busy: false,
                best_at: None,
                taken: None,
            }),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the worker of tasks that have just become claimable: of how many, and whether others wait.
    pub(super) fn offer(&self, tasks: &[&Announcement], now: Instant) -> (usize, bool) {
        let mut state = self.state();
        let (mut told, mut held_back) = (0, false);
        for task in tasks {
            let offer = self.offer_from(&mut state, From::Live, task, now);
            told += usize::from(offer == Offer::Told);
            held_back |= offer == Offer::HeldBack;
        }
        (told, held_back)
    }

    fn offer_from(
        &self,
        state: &mut State,
        from: From,
        task: &Announcement,
        now: Instant,
    ) -> Offer {
        // Tasks are claimed for a worker with slots, and it is told of nothing else.
        if self.has_slots || !state.routing.matches(task.push.task.routing()) {
            return Offer::Passed;
        }
        let frames = [&task.frames.available, &task.frames.task];
        let frames = if self.wants_task { &frames[..] } else { &frames[..1] };
        let priority = task.priority();
        let offer = Offered {
            ready: task.ready(),
            priority,
            bytes: on_the_way(frames.iter().copied()),
            is_urgent: state.waiting.is_urgent(priority),
        };
        let is_behind = from == From::Live && state.waiting.goes_before(priority);
        match state.window.consider(offer, now) {
            Verdict::Known => return Offer::Passed,
            // No news, and the worker has not read what it was told since.
            Verdict::Again if state.is_retiring || !self.mailbox.is_empty() => {
                return Offer::Passed;
            }
            Verdict::Announce if is_behind => return state.hold_back(priority),
            Verdict::Announce | Verdict::Anew if state.is_retiring => {
                return state.hold_back(priority);
            }
            Verdict::HoldBack => return state.hold_back(priority),
            Verdict::Unread => {
                state.window.wait_for_proof();
                return state.hold_back(priority);
            }
            Verdict::Announce | Verdict::Again | Verdict::Anew => {}
        }
        if !self.mailbox.put(frames) {
            state.waiting.hold(Some(priority));
            return Offer::SocketIsBusy;
        }
        state.window.note(offer, now);
        Offer::Told
    }

    /// How well its worker would take a task, for whom it would be news; `None`: it is not for this worker,
    /// or no news, or the stream is about to end, or is told of nothing since it has slots.
    pub(super) fn rank(&self, task: &Announcement) -> Option<Rank> {
        if self.has_slots {
            return None;
        }
        let is_behind = !self.mailbox.is_empty();
        let state = self.state();
        let would_take = !state.is_retiring
            && state.routing.matches(task.push.task.routing())
            && !state.window.has(task.ready());
        would_take.then(|| Rank {
            is_full: is_behind || state.waiting.is_any() || !state.window.has_room(),
            is_busy: state.is_busy,
            outstanding: state.window.count(),
        })
    }

    /// Notes whether its worker holds a claim.
    pub(super) fn note_busy(&self, is_busy: bool) {
        self.state().is_busy = is_busy;
    }

    /// What it was told of and has not acted on.
    pub(super) fn outstanding(&self) -> Vec<Ready> {
        self.state().window.outstanding().collect()
    }

    /// Sends the worker a frame that announces nothing, whatever it has read.
    pub(super) fn deliver(&self, frame: Bytes) {
        let mut state = self.state();
        let frames = [frame];
        if self.mailbox.put(&frames) {
            state.window.note_other(on_the_way(&frames));
        }
    }

    /// The keepalive after some silence, unless the worker has not read for so long that even those
    /// would fill its socket.
    pub fn keepalive(&self) -> Option<Bytes> {
        let frame = frames::keepalive();
        let mut state = self.state();
        if state.window.note_keepalive(on_the_way([&frame])) {
            return Some(frame);
        }
        // Who holds no claim may as well begin afresh.
        let soon = Instant::now();
        state.ages_at = Some(state.ages_at.map_or(soon, |at| at.min(soon + AGE_TRY_AGAIN)));
        None
    }

    /// How much of a backlog that was read for several is for its worker.
    pub(super) fn matching(&self, backlog: &[Announcement]) -> usize {
        let state = self.state();
        backlog.iter().filter(|task| state.routing.matches(task.push.task.routing())).count()
    }

    /// To be called before the backlog is read from Postgres.
    pub fn refill_begin(&self) -> Refill {
        let mut state = self.state();
        state.waiting.behind_next = None;
        Refill(state.waiting.held_back)
    }

    /// Tells the worker of its backlog, best first. `is_all`: there is no more than this. How many
    /// it was told of, and whether to read again at once.
    pub fn refill(&self, before: Refill, backlog: &[Announcement], is_all: bool) -> (usize, bool) {
        let now = Instant::now();
        let mut state = self.state();
        let offers: Vec<_> = backlog
            .iter()
            .map(|task| self.offer_from(&mut state, From::Backlog, task, now))
            .collect();
        let count = |what| offers.iter().filter(|offer| **offer == what).count();
        let (told, held) = (count(Offer::Told), count(Offer::HeldBack));
        let is_busy = count(Offer::SocketIsBusy) > 0;

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
        if self.has_slots {
            return state.can_fill();
        }
        state.waiting.is_any() && state.window.has_room()
    }

    /// The worker acted on a task; whether there is room for more now that waits.
    pub(super) fn settle(&self, task: TaskId) -> bool {
        self.state().window.settle(task);
        self.wants_more()
    }

    /// What the worker was told of a task is not so; whether there is room for more now that waits.
    pub(super) fn unsay(&self, task: TaskId) -> bool {
        self.state().window.unsay(task);
        self.wants_more()
    }

    /// The worker asked for a task by its id at that time, which proves that it has read so far.
    pub(super) fn prove(&self, task: TaskId, asked_at: Instant) {
        self.state().window.prove(task, asked_at);
    }

    /// The worker asked for whatever is best. That proves nothing: it may go on so without reading.
    pub(super) fn asked_for_the_best(&self, now: Instant) {
        self.state().best_at = Some(now);
    }

    /// Whether it is about to end.
    pub(super) fn is_retiring(&self) -> bool {
        self.state().is_retiring
    }

    /// The worker could not claim a task because its row was locked.
    pub(super) fn hasten(&self, task: TaskId) {
        self.state().window.hasten(task, Instant::now());
    }

    /// Since when it is old enough to end, if it is.
    pub(super) fn aged_since(&self, now: Instant) -> Option<Instant> {
        self.state().ages_at.filter(|at| *at <= now)
    }

    /// Announces nothing more.
    pub(super) fn retire(&self) {
        self.state().is_retiring = true;
    }

    /// Goes on as before, and is old enough to end a while later.
    pub(super) fn go_on(&self) {
        let mut state = self.state();
        state.is_retiring = false;
        state.ages_at = Some(Instant::now() + AGE_TRY_AGAIN);
        state.waiting.hold(None);
    }

    /// For how long its socket has taken nothing of what waits for it.
    pub(super) fn stuck_for(&self, now: Instant) -> Duration {
        let taken = self.mailbox.taken_while_waiting();
        let mut state = self.state();
        let since = match (taken, state.taken) {
            (Some(taken), Some((before, since))) if taken == before => since,
            _ => now,
        };
        state.taken = taken.map(|taken| (taken, since));
        now.saturating_duration_since(since)
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
