//! A stream with slots: what is claimed for its worker, and pushed to it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::announcement::Announcement;
use super::frames;
use super::slots::{Frame, Look, Slots, new_claim_id};
use super::stream::{State, Stream};
use super::unread::on_the_way;
use crate::domain::TaskId;
use crate::store::Claimed;

/// What is to be claimed for one stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) claim_id: Uuid,
    pub(super) count: usize,
    /// Bytes that may be pushed, about.
    pub(super) room_bytes: u64,
    /// What was held back when this began.
    before: u64,
}

impl State {
    /// Whether there is something to do for its slots, and room for it.
    pub(super) fn can_fill(&self) -> bool {
        let room = self.window.room_bytes();
        self.slots.as_ref().is_some_and(|slots| {
            !slots.is_filling
                && (!slots.owed(room).is_empty()
                    || self.waiting.is_any() && self.claimable(slots) > 0)
        })
    }

    fn claimable(&self, slots: &Slots) -> usize {
        if self.is_retiring { 0 } else { slots.claimable(self.window.room_bytes()) }
    }

    /// Whether tasks wait only until its worker has read more.
    pub(super) fn slots_wait_for_proof(&self) -> bool {
        self.slots.as_ref().is_some_and(|slots| {
            let room = self.window.room_bytes();
            slots.owes() && slots.owed(room).is_empty()
                || self.waiting.is_any() && slots.free() > 0 && slots.claimable(room) == 0
        })
    }

    /// Its worker holds no claim, and has held none since: it has read what it was pushed before.
    pub(super) fn rest(&mut self, since: Instant) {
        if let Some(slots) = &self.slots
            && slots.is_idle()
            && slots.pushed_at.is_none_or(|at| at <= since)
        {
            self.window.prove_all();
        }
    }
}

impl Stream {
    /// How many slots it has.
    pub(super) fn slots(&self) -> Option<usize> {
        self.state().slots.as_ref().map(|slots| slots.size())
    }

    /// How many slots are free for a task that has just become claimable; `None`: it is not for this
    /// worker. None are where better ones may wait in Postgres: these go first.
    pub(super) fn free_for(&self, task: &Announcement) -> Option<usize> {
        let state = self.state();
        let slots = state.slots.as_ref()?;
        if !state.routing.matches(task.push.task.routing()) {
            return None;
        }
        Some(if state.waiting.is_any() { 0 } else { state.claimable(slots) })
    }

    /// Takes a slot for such a task; the claim that is to be made.
    pub(super) fn reserve(&self) -> Option<Uuid> {
        let mut state = self.state();
        let is_free = state.slots.as_ref().is_some_and(|slots| state.claimable(slots) > 0);
        is_free.then(|| state.slots.as_mut().map(|slots| begin_one(slots))).flatten()
    }

    /// A claim that was to be made is not, or nobody knows.
    pub(super) fn give_up(&self, claim_id: Uuid) {
        if let Some(slots) = &mut self.state().slots {
            slots.end(claim_id);
        }
    }

    /// Begins to fill free slots, unless somebody does or there is nothing to do.
    pub(super) fn begin_to_fill(&self) -> bool {
        let mut state = self.state();
        let can = state.can_fill();
        if can && let Some(slots) = &mut state.slots {
            slots.is_filling = true;
        }
        can
    }

    /// Nobody is at work for it any more.
    pub(super) fn filled(&self) {
        if let Some(slots) = &mut self.state().slots {
            slots.is_filling = false;
        }
    }

    /// What is to be pushed of what its worker holds.
    pub(super) fn owed(&self) -> Vec<TaskId> {
        let state = self.state();
        let room = state.window.room_bytes();
        state.slots.as_ref().map(|slots| slots.owed(room)).unwrap_or_default()
    }

    /// What is to be claimed for it from the backlog: takes the slots for it.
    pub(super) fn begin_to_claim(&self) -> Option<Wanted> {
        let mut state = self.state();
        let count = state.claimable(state.slots.as_ref()?);
        if count == 0 || !state.waiting.is_any() {
            return None;
        }
        let (before, room_bytes) = (state.waiting.held_back, state.window.room_bytes());
        let claim_id = new_claim_id();
        state.slots.as_mut()?.begin(claim_id, count);
        Some(Wanted { claim_id, count, room_bytes, before })
    }

    /// There was nothing to claim, and nothing waits.
    pub(super) fn settle_backlog(&self, wanted: &Wanted) {
        let mut state = self.state();
        state.waiting.settled = state.waiting.settled.max(wanted.before);
    }

    /// How long to wait before tasks are looked for again that were there and locked.
    pub(super) fn locked_pause(&self) -> Duration {
        self.state().slots.as_mut().map(|slots| slots.locked_pause()).unwrap_or_default()
    }

    /// Pushes what was claimed with an id; false: the stream has ended, and its worker will not hear.
    pub(super) fn push_claimed(&self, claim_id: Uuid, claimed: &[Claimed]) -> bool {
        {
            let mut state = self.state();
            let Some(slots) = &mut state.slots else { return false };
            slots.end(claim_id);
            for Claimed { task, .. } in claimed {
                slots.hold_new(task.id, task.claim_epoch);
            }
        }
        self.push_owed(claimed)
    }

    /// Pushes tasks that its worker holds and was not told of on this stream, as far as there is room.
    pub(super) fn push_owed(&self, tasks: &[Claimed]) -> bool {
        let mut state = self.state();
        let State { slots: Some(slots), window, .. } = &mut *state else { return false };
        for claimed in tasks {
            let (id, epoch) = (claimed.task.id, claimed.task.claim_epoch);
            let Some(is_again) = slots.is_owed(id, epoch) else { continue };
            let mut frame = frames::assigned(claimed, is_again, false);
            if on_the_way([&frame]) > window.room_bytes() {
                frame = frames::assigned(claimed, is_again, true);
            }
            let bytes = on_the_way([&frame]);
            if bytes > window.room_bytes() {
                return true;
            }
            // Under the stream's lock: who ends it takes what was not pushed by then.
            let Some(number) = self.mailbox.put_one(frame) else {
                return !self.mailbox.is_closed();
            };
            let mark = window.note_pushed(bytes);
            slots.pushed(id, Frame { number, mark }, bytes, Instant::now());
        }
        true
    }

    /// Of some tasks that are owed, those that were not found are not held any more.
    pub(super) fn write_off(&self, asked: &[TaskId], found: &[Claimed]) {
        if let Some(slots) = &mut self.state().slots {
            for task in asked.iter().filter(|id| found.iter().all(|other| other.task.id != **id)) {
                slots.write_off(*task);
            }
        }
    }

    /// Its worker holds a task that it knows of; with the id of the slot that was taken for it, if one was.
    pub(super) fn hold(&self, task: TaskId, epoch: i64, reserved: Option<Uuid>) {
        if let Some(slots) = &mut self.state().slots {
            if let Some(claim_id) = reserved {
                slots.end(claim_id);
            }
            slots.hold(task, epoch);
        }
    }

    /// Its worker holds a task that it may not know of: the answer went to where it was before.
    pub(super) fn owe(&self, task: TaskId, epoch: i64) {
        if let Some(slots) = &mut self.state().slots {
            slots.owe(task, epoch);
        }
    }

    /// Its worker ended a claim, here: the slot is free, or goes on to what comes next in the same moment.
    pub(super) fn finish(&self, task: TaskId, epoch: i64, for_next: bool) -> Option<Uuid> {
        let mut state = self.state();
        let slots = state.slots.as_mut()?;
        let read = slots.finish(task, epoch);
        let reserved = for_next.then(|| begin_one(slots));
        if let Some(mark) = read {
            state.window.prove_mark(mark);
        }
        reserved
    }

    /// Its worker acted on a task that it holds: it has read its stream so far.
    pub(super) fn acted_on(&self, task: TaskId) {
        let mut state = self.state();
        if let Some(mark) = state.slots.as_ref().and_then(|slots| slots.mark(task)) {
            state.window.prove_mark(mark);
        }
    }

    /// To be called before Postgres is asked what its worker holds.
    pub(super) fn look_begins(&self) -> Option<u64> {
        self.state().slots.as_ref().map(|slots| slots.look_begins())
    }

    /// Compares with what Postgres said. `proves`: it was its worker that ended what is gone.
    pub(super) fn look(&self, began: u64, look: Look<'_>, proves: bool) {
        let mut state = self.state();
        let read = state.slots.as_mut().and_then(|slots| slots.look(began, look, Instant::now()));
        if let Some(mark) = read.filter(|_| proves) {
            state.window.prove_mark(mark);
        }
    }

    /// Whether what its worker holds is known.
    pub(super) fn is_known(&self) -> bool {
        self.state().slots.as_ref().is_some_and(|slots| slots.is_known())
    }

    /// Whether what was missing in a look is to be confirmed by another one.
    pub(super) fn is_doubtful(&self) -> bool {
        self.state().slots.as_ref().is_some_and(|slots| slots.is_doubtful())
    }

    /// So many frames of its mailbox have left: what is in them its worker may have read.
    pub fn has_left(&self, frames: u64) {
        self.frames_left.fetch_max(frames, Ordering::Relaxed);
    }

    /// Gives it nothing more.
    pub(super) fn close_slots(&self) {
        if let Some(slots) = &mut self.state().slots {
            slots.close();
        }
    }

    /// After its end: claims that its worker cannot know of.
    pub(super) fn unread_claims(&self) -> Vec<(TaskId, i64)> {
        let mut state = self.state();
        let Some(slots) = &mut state.slots else { return Vec::new() };
        slots.close();
        self.mailbox.shut();
        let frames_left = self.frames_left.load(Ordering::Relaxed);
        slots.unread_by_anyone(frames_left)
    }
}

fn begin_one(slots: &mut Slots) -> Uuid {
    let claim_id = new_claim_id();
    slots.begin(claim_id, 1);
    claim_id
}
