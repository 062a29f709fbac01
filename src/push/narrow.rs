//! Which tasks were offered to few workers, and when each is to be offered to more (see `fanout`): bookkeeping.
//! Bounded, and may be lost.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::stream::Stream;
use crate::domain::fanout::{Lot, Place};
use crate::domain::{Fanout, TaskId};
use crate::store::Ready;

/// After this long a task that stays unclaimed is offered to twice as many.
const WIDEN_AFTER: Duration = Duration::from_millis(300);
/// How often it is widened so; the next time all hear of it.
const WIDENINGS_MAX: u32 = 5;
/// Tasks that one statement asks about.
pub(super) const LOOKUP_MAX: usize = 1_000;
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
#[derive(Debug, PartialEq, Eq)]
pub(super) enum First {
    /// It is to be offered to all at once.
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

    /// Begins to offer a task to few.
    pub(super) fn begin(&self, Ready { id, xid }: Ready) -> First {
        let Fanout::First(count) = self.fanout else {
            return First::ToAll;
        };
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn ready(xid: i64) -> Ready {
        Ready { id: TaskId::generate(), xid }
    }

    fn offered(narrow: &Narrow, ready: Ready) {
        assert_eq!(narrow.begin(ready), First::Few(3));
        narrow.note(ready, 3, false);
    }

    /// What is due by now.
    fn due(narrow: &Narrow) -> Vec<Ready> {
        let due = narrow.due().now_or_never().unwrap_or_default();
        due.into_iter().map(|due| due.ready).collect()
    }

    /// Moves the clock rather than to wait.
    fn pass(narrow: &Narrow, time: Duration) {
        for (at, _) in &mut narrow.lock().due {
            *at = at.checked_sub(time).unwrap();
        }
    }

    #[tokio::test]
    async fn a_task_is_widened_by_steps_in_its_time_and_goes_to_all_in_the_end() {
        let narrow = Narrow::new(Fanout::First(3));
        let task = ready(1);
        offered(&narrow, task);
        for (count, told) in [(6, 3), (12, 6), (24, 12), (48, 24), (96, 48)] {
            assert!(due(&narrow).is_empty());
            pass(&narrow, WIDEN_AFTER);
            assert_eq!(due(&narrow), [task]);
            assert_eq!(narrow.widen(task), Some((count, told)));
            narrow.note(task, count - told, false);
        }
        pass(&narrow, WIDEN_AFTER);
        assert_eq!(due(&narrow), [task]);
        assert_eq!(narrow.widen(task), None, "to all");
        assert!(narrow.lock().offers.is_empty() && narrow.lock().due.is_empty());
    }

    #[tokio::test]
    async fn an_announcement_that_comes_again_is_no_news_and_one_of_another_time_is() {
        let narrow = Narrow::new(Fanout::First(3));
        let task = ready(5);
        offered(&narrow, task);
        assert_eq!(narrow.begin(task), First::Known);
        assert_eq!(narrow.begin(Ready { xid: 4, ..task }), First::Known);
        let later = Ready { xid: 6, ..task };
        offered(&narrow, later);
        pass(&narrow, WIDEN_AFTER);
        assert_eq!(due(&narrow), [later]);
    }

    #[tokio::test]
    async fn what_is_hastened_is_due_at_once_and_only_once() {
        let narrow = Narrow::new(Fanout::First(3));
        let (first, second) = (ready(1), ready(2));
        offered(&narrow, first);
        offered(&narrow, second);
        narrow.hasten(second.id);
        narrow.hasten(second.id);
        narrow.hasten(TaskId::generate());
        assert_eq!(due(&narrow), [second]);
        assert_eq!(narrow.widen(second), Some((6, 3)));
        narrow.note(second, 3, false);
        pass(&narrow, WIDEN_AFTER);
        assert_eq!(due(&narrow), [first, second]);
        assert!(narrow.lock().due.is_empty());
    }

    #[tokio::test]
    async fn where_all_were_asked_the_next_offer_is_to_all() {
        let narrow = Narrow::new(Fanout::First(3));
        let task = ready(1);
        assert_eq!(narrow.begin(task), First::Few(3));
        narrow.note(task, 1, true);
        pass(&narrow, WIDEN_AFTER);
        assert_eq!(due(&narrow), [task]);
        assert_eq!(narrow.widen(task), None);
    }

    #[tokio::test]
    async fn what_had_its_turn_and_is_gone_is_forgotten_and_a_failed_look_is_repeated() {
        let narrow = Narrow::new(Fanout::First(3));
        let (gone, stays) = (ready(1), ready(2));
        offered(&narrow, gone);
        offered(&narrow, stays);
        pass(&narrow, WIDEN_AFTER);
        let taken = narrow.due().await;
        narrow.again(taken);
        let taken = narrow.due().await;
        assert_eq!(taken.len(), 2);
        assert_eq!(narrow.widen(stays), Some((6, 3)));
        narrow.note(stays, 0, false);
        narrow.forget(&taken);
        assert_eq!(narrow.begin(stays), First::Known);
        assert_eq!(narrow.begin(gone), First::Few(3));
    }

    #[tokio::test]
    async fn beyond_so_many_tasks_on_offer_all_hear_at_once() {
        let narrow = Narrow::new(Fanout::First(3));
        for n in 0..OFFERS_MAX {
            offered(&narrow, ready(i64::try_from(n).unwrap()));
        }
        assert_eq!(narrow.begin(ready(0)), First::ToAll);
        assert_eq!(Narrow::new(Fanout::All).begin(ready(0)), First::ToAll);
    }

    #[test]
    fn who_knows_nothing_of_the_others_makes_all_offers() {
        let narrow = Narrow::new(Fanout::First(3));
        assert_eq!(narrow.share(3, ready(1)), 3);
        narrow.stand(Place::new(0, 1, 3));
        assert_eq!(narrow.share(3, ready(1)), 1);
    }
}
