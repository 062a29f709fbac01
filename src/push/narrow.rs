//! Which tasks were offered to few workers, and when each is to be offered to more (see `fanout`): bookkeeping.
//! Bounded, and may be lost.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::stream::{Announcement, Stream};
use crate::domain::fanout::{Lot, Place};
use crate::domain::{Fanout, TaskId};
use crate::store::Ready;

/// After this long a task that stays unclaimed is offered to twice as many.
const WIDEN_AFTER: Duration = Duration::from_millis(300);
/// How often it is widened so; the next time all hear of it.
const WIDENINGS_MAX: u32 = 5;
/// Tasks that one statement asks about.
const LOOKUP_MAX: usize = 1_000;
/// Tasks that may be on offer to few at a time; what comes besides is offered to all.
const OFFERS_MAX: usize = 20_000;

/// Tasks that were offered to few workers here.
#[derive(Debug)]
pub(super) struct Narrow {
    fanout: Fanout,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Where this replica's streams stand among all; nothing is known yet, or it has none.
    place: Option<Place>,
    offers: HashMap<TaskId, Offer>,
    /// What is to be widened next stands first. What has been widened or forgotten since is passed over.
    due: VecDeque<(Instant, Due)>,
}

/// One task on offer.
#[derive(Debug)]
struct Offer {
    xid: i64,
    /// How often it was widened.
    turn: u32,
    /// How many workers were told here.
    told: u32,
    is_hastened: bool,
}

/// Which widening of which task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) ready: Ready,
    turn: u32,
}

/// What is to be done with an announcement.
pub(super) enum First {
    ToAll,
    /// It came before, by another notification or by the sweep, and is being offered.
    Known,
    /// To so many over all replicas.
    Few(u32),
}

impl Narrow {
    pub(super) fn new(fanout: Fanout) -> Self {
        Self { fanout, state: Mutex::default(), changed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, task: &Announcement) -> First {
        let Fanout::First(count) = self.fanout else {
            return First::ToAll;
        };
        // Nobody else could take what is for one worker.
        if task.push.task.target_worker_id.is_some() {
            return First::ToAll;
        }
        let Ready { id, xid } = task.ready();
        let mut state = self.lock();
        if state.offers.get(&id).is_some_and(|offer| offer.xid >= xid) {
            return First::Known;
        }
        if state.offers.len() >= OFFERS_MAX && !state.offers.contains_key(&id) {
            return First::ToAll;
        }
        state.offers.insert(id, Offer { xid, turn: 0, told: 0, is_hastened: false });
        First::Few(count)
    }

    /// Notes where this replica's streams stand.
    pub(super) fn stand(&self, place: Option<Place>) {
        self.lock().place = place;
    }

    /// How many of so many offers are to be made here; all of them while nothing is known of the others.
    pub(super) fn share(&self, count: u32, ready: Ready) -> u32 {
        let place = self.lock().place;
        place.map_or(count, |place| place.share(count, Lot::draw(ready.id, ready.xid)))
    }

    /// Notes who was told. `is_all`: everybody here was asked already.
    pub(super) fn note(&self, ready: Ready, told: u32, is_all: bool) {
        let mut state = self.lock();
        let State { offers, due, .. } = &mut *state;
        let Some(offer) = offers.get_mut(&ready.id).filter(|offer| offer.xid == ready.xid) else {
            return;
        };
        offer.told = offer.told.saturating_add(told);
        if is_all {
            offer.turn = WIDENINGS_MAX;
        }
        offer.is_hastened = false;
        due.push_back((Instant::now() + WIDEN_AFTER, Due { ready, turn: offer.turn }));
        let is_first = due.len() == 1;
        drop(state);
        if is_first {
            self.changed.notify_one();
        }
    }

    /// Takes the next step of a task: to how many it is to be offered over all replicas, and how many were
    /// told here. `None`: to all.
    pub(super) fn widen(&self, ready: Ready) -> Option<(u32, u32)> {
        let Fanout::First(count) = self.fanout else {
            return None;
        };
        let mut state = self.lock();
        let is_it = |offer: &&mut Offer| offer.xid == ready.xid;
        let offer = state.offers.get_mut(&ready.id).filter(is_it)?;
        if offer.turn >= WIDENINGS_MAX {
            state.offers.remove(&ready.id);
            return None;
        }
        offer.turn += 1;
        Some((count << offer.turn, offer.told))
    }

    /// Has a task widened soon.
    pub(super) fn hasten(&self, task: TaskId) {
        if self.fanout == Fanout::All {
            return;
        }
        let mut state = self.lock();
        let State { offers, due, .. } = &mut *state;
        if let Some(offer) = offers.get_mut(&task)
            && !offer.is_hastened
        {
            offer.is_hastened = true;
            let ready = Ready { id: task, xid: offer.xid };
            due.push_front((Instant::now(), Due { ready, turn: offer.turn }));
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Has widened what a stream that ended was told of.
    pub(super) fn left_by(&self, stream: &Stream) {
        if self.fanout != Fanout::All {
            stream.outstanding().into_iter().for_each(|ready| self.hasten(ready.id));
        }
    }

    /// What is to be widened, once there is something.
    pub(super) async fn due(&self) -> Vec<Due> {
        loop {
            let next = {
                let mut state = self.lock();
                let due = state.take_due(Instant::now());
                if !due.is_empty() {
                    return due;
                }
                state.due.front().map(|(at, _)| *at)
            };
            let changed = self.changed.notified();
            match next {
                Some(at) => tokio::select! {
                    () = tokio::time::sleep_until(at) => {}
                    () = changed => {}
                },
                None => changed.await,
            }
        }
    }

    /// Forgets what had its turn and took no further step: it is claimed, or gone, or news by now.
    pub(super) fn forget(&self, due: &[Due]) {
        let mut state = self.lock();
        for due in due {
            if state.is_current(*due) {
                state.offers.remove(&due.ready.id);
            }
        }
    }

    /// Has them widened another time.
    pub(super) fn again(&self, due: Vec<Due>) {
        let mut state = self.lock();
        for due in due.into_iter().rev() {
            if state.is_current(due) {
                state.due.push_front((Instant::now(), due));
            }
        }
    }
}

impl State {
    fn is_current(&self, due: Due) -> bool {
        let offer = self.offers.get(&due.ready.id);
        offer.is_some_and(|offer| offer.xid == due.ready.xid && offer.turn == due.turn)
    }

    fn take_due(&mut self, now: Instant) -> Vec<Due> {
        let mut taken = Vec::new();
        while taken.len() < LOOKUP_MAX
            && let Some((_, due)) = self.due.pop_front_if(|(at, _)| *at <= now)
        {
            if self.is_current(due) {
                taken.push(due);
            }
        }
        taken
    }
}
