//! What a worker with slots holds, as far as its stream knows (protocol S11): pure bookkeeping.
//!
//! A claim takes its slot before it is made, and again when it is known to have been won. What ended
//! elsewhere is noticed by comparing with Postgres. Such a look is older than what happened since it
//! began, so each claim knows when it came: a look only speaks of those that were there before it.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::unread::Mark;
use crate::domain::TaskId;
use crate::store::HeldClaim;

/// What is missing in a look at all that a worker holds must be missing in another one so much later: in
/// between, an answer that carries the next task may have put it into the same slot.
pub const GONE_FOR: Duration = Duration::from_secs(1);
/// The bytes of a frame, until it is known what they are here.
const FRAME_BYTES_USUAL: u64 = 1024;
/// How soon to look again for tasks that were there and locked; then after twice as long each time.
const LOCKED_FIRST: Duration = Duration::from_millis(10);
/// The longest of these waits.
const LOCKED_LAST: Duration = Duration::from_secs(2);
/// How the ids of claims begin that the server makes for its streams.
const CLAIM_MARK: [u8; 4] = *b"slot";

/// A new id for a claim that the server makes, which tells what was pushed from what the worker claimed by
/// itself. Version 8, which is for such uses: no client's id looks like it by chance.
pub(super) fn new_claim_id() -> Uuid {
    let mut bytes = Uuid::new_v4().into_bytes();
    bytes[..4].copy_from_slice(&CLAIM_MARK);
    bytes[6] = bytes[6] & 0x0f | 0x80;
    Uuid::from_bytes(bytes)
}

fn is_pushed(claim: &HeldClaim) -> bool {
    claim
        .claim_id
        .is_some_and(|id| id.as_bytes().starts_with(&CLAIM_MARK) && id.get_version_num() == 8)
}

/// The slots of one stream.
#[derive(Debug)]
pub(super) struct Slots {
    size: usize,
    held: HashMap<TaskId, Held>,
    /// Claims that are being made, and how many slots each may fill.
    under_way: HashMap<Uuid, usize>,
    reserved: usize,
    /// Held, and not pushed on this stream yet.
    owed: VecDeque<TaskId>,
    /// Grows with each claim that comes.
    clock: u64,
    /// What its worker holds is known: nothing is given to it before.
    is_known: bool,
    /// Somebody is at work for it.
    pub(super) is_filling: bool,
    /// Nothing more is given to it.
    is_closed: bool,
    /// The bytes of a frame, about.
    frame_bytes: u64,
    locked_pause: Duration,
    /// When the last frame was pushed.
    pub(super) pushed_at: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    epoch: i64,
    since: u64,
    /// Since when Postgres says otherwise.
    gone_at: Option<Instant>,
    /// Its worker cannot know of it but from this stream.
    is_new: bool,
    frame: Option<Frame>,
}

/// Where the event of a task stands in its stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    /// Which frame of the mailbox.
    pub(super) number: u64,
    /// Who acts on the task has read so far.
    pub(super) mark: Mark,
}

/// What a look says.
#[derive(Clone, Copy, Debug)]
pub(super) enum Look<'a> {
    /// All that the worker holds.
    All(&'a [HeldClaim]),
    /// Whether it holds one task.
    Task(TaskId, Option<HeldClaim>),
    /// It held this one, which has ended already; of what came after it nothing is known yet.
    Passing(TaskId),
}

impl Slots {
    pub(super) fn new(size: usize) -> Self {
        Self {
            size,
            held: HashMap::new(),
            under_way: HashMap::new(),
            reserved: 0,
            owed: VecDeque::new(),
            clock: 0,
            is_known: false,
            is_filling: false,
            is_closed: false,
            frame_bytes: FRAME_BYTES_USUAL,
            locked_pause: LOCKED_FIRST,
            pushed_at: None,
        }
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    pub(super) fn is_known(&self) -> bool {
        self.is_known
    }

    /// Slots that can be filled now.
    pub(super) fn free(&self) -> usize {
        if self.is_closed || !self.is_known || !self.owed.is_empty() {
            return 0;
        }
        self.size.saturating_sub(self.held.len() + self.reserved)
    }

    /// How many tasks may be claimed, if so many bytes may be pushed.
    pub(super) fn claimable(&self, room_bytes: u64) -> usize {
        let by_room = (room_bytes / self.frame_bytes).saturating_sub(self.reserved as u64);
        self.free().min(usize::try_from(by_room).unwrap_or(usize::MAX))
    }

    /// How many of what is owed may be pushed, if so many bytes may.
    fn payable(&self, room_bytes: u64) -> usize {
        let by_room = usize::try_from(room_bytes / self.frame_bytes).unwrap_or(usize::MAX);
        if self.is_closed { 0 } else { self.owed.len().min(by_room) }
    }

    pub(super) fn owes(&self) -> bool {
        !self.owed.is_empty() && !self.is_closed
    }

    /// What is owed and may be pushed.
    pub(super) fn owed(&self, room_bytes: u64) -> Vec<TaskId> {
        self.owed.iter().copied().take(self.payable(room_bytes)).collect()
    }

    /// Takes slots for a claim that is about to be made.
    pub(super) fn begin(&mut self, claim_id: Uuid, count: usize) {
        self.under_way.insert(claim_id, count);
        self.reserved += count;
    }

    /// The claim was made or not, or nobody knows: then a look tells.
    pub(super) fn end(&mut self, claim_id: Uuid) {
        self.reserved -= self.under_way.remove(&claim_id).unwrap_or_default();
    }

    /// The worker holds a task that this stream need not push.
    pub(super) fn hold(&mut self, task: TaskId, epoch: i64) {
        self.insert(task, epoch, false);
    }

    /// The worker holds a task that was claimed for it, and which is to be pushed.
    pub(super) fn hold_new(&mut self, task: TaskId, epoch: i64) {
        if self.insert(task, epoch, true) {
            self.owed.push_back(task);
        }
        self.locked_pause = LOCKED_FIRST;
    }

    /// The worker holds a task that it may not know of, and which is to be pushed.
    pub(super) fn owe(&mut self, task: TaskId, epoch: i64) {
        if self.insert(task, epoch, false) {
            self.owed.push_back(task);
        }
    }

    /// Whether that is news.
    fn insert(&mut self, task: TaskId, epoch: i64, is_new: bool) -> bool {
        if self.held.get(&task).is_some_and(|known| known.epoch >= epoch) {
            return false;
        }
        // Of an earlier claim of the same task, which is over.
        self.remove(task);
        self.clock += 1;
        let held = Held { epoch, since: self.clock, gone_at: None, is_new, frame: None };
        self.held.insert(task, held);
        true
    }

    /// Whether what is owed of a task is this claim; and whether its worker was told of it before.
    pub(super) fn is_owed(&self, task: TaskId, epoch: i64) -> Option<bool> {
        let held = self.held.get(&task)?;
        (held.epoch == epoch && held.frame.is_none() && self.owed.contains(&task))
            .then_some(!held.is_new)
    }

    /// It was pushed.
    pub(super) fn pushed(&mut self, task: TaskId, frame: Frame, bytes: u64, now: Instant) {
        if let Some(held) = self.held.get_mut(&task) {
            held.frame = Some(frame);
        }
        if self.owed.front() == Some(&task) {
            self.owed.pop_front();
        } else {
            self.owed.retain(|other| *other != task);
        }
        self.frame_bytes = ((self.frame_bytes * 7 + bytes) / 8).max(1);
        self.pushed_at = Some(now);
    }

    /// What is owed is not held any more.
    pub(super) fn write_off(&mut self, task: TaskId) {
        if self.held.get(&task).is_some_and(|held| held.frame.is_none()) {
            self.remove(task);
        }
    }

    fn remove(&mut self, task: TaskId) -> Option<Held> {
        let held = self.held.remove(&task)?;
        if held.frame.is_none() {
            self.owed.retain(|other| *other != task);
        }
        Some(held)
    }

    /// The worker ended a claim. So far it has read its stream.
    pub(super) fn finish(&mut self, task: TaskId, epoch: i64) -> Option<Mark> {
        if self.held.get(&task)?.epoch > epoch {
            return None;
        }
        self.remove(task)?.frame.map(|frame| frame.mark)
    }

    /// How far the worker has read that acts on a task.
    pub(super) fn mark(&self, task: TaskId) -> Option<Mark> {
        self.held.get(&task)?.frame.map(|frame| frame.mark)
    }

    /// To be called before Postgres is asked what the worker holds.
    pub(super) fn look_begins(&self) -> u64 {
        self.clock
    }

    /// Compares with what Postgres said. How far the worker has read that ended one of them.
    pub(super) fn look(&mut self, began: u64, look: Look<'_>, now: Instant) -> Option<Mark> {
        let mut read = None;
        let claims = match look {
            Look::All(claims) => {
                self.miss(began, claims, now);
                claims
            }
            Look::Task(task, found) => {
                let is_gone = self.held.get(&task).is_some_and(|held| {
                    held.since <= began && found.is_none_or(|claim| claim.claim_epoch > held.epoch)
                });
                if is_gone {
                    read = self.remove(task).and_then(|held| held.frame).map(|frame| frame.mark);
                }
                &found.into_iter().collect::<Vec<_>>()
            }
            Look::Passing(task) => {
                self.insert(task, 0, false);
                &[]
            }
        };
        let is_first = !self.is_known;
        for claim in claims {
            let is_known =
                self.held.get(&claim.task_id).is_some_and(|held| held.epoch >= claim.claim_epoch);
            let is_under_way = claim.claim_id.is_some_and(|id| self.under_way.contains_key(&id));
            if is_known || is_under_way {
                continue;
            }
            // What the worker has claimed by itself since it connected, it knows.
            if is_first || is_pushed(claim) {
                self.owe(claim.task_id, claim.claim_epoch);
            } else {
                self.hold(claim.task_id, claim.claim_epoch);
            }
        }
        if matches!(look, Look::All(_)) {
            self.is_known = true;
        }
        read
    }

    /// Frees what was not there in two looks at all.
    fn miss(&mut self, began: u64, claims: &[HeldClaim], now: Instant) {
        let there: HashMap<_, _> =
            claims.iter().map(|claim| (claim.task_id, claim.claim_epoch)).collect();
        let mut gone = Vec::new();
        for (task, held) in &mut self.held {
            if held.since > began {
                continue;
            }
            if there.get(task).is_some_and(|epoch| *epoch == held.epoch) {
                held.gone_at = None;
                continue;
            }
            let since = *held.gone_at.get_or_insert(now);
            if now.saturating_duration_since(since) >= GONE_FOR {
                gone.push(*task);
            }
        }
        for task in gone {
            self.remove(task);
        }
    }

    /// Whether a look found something missing, and another one is to confirm it.
    pub(super) fn is_doubtful(&self) -> bool {
        self.held.values().any(|held| held.gone_at.is_some())
    }

    /// Whether its worker knows of nothing that it holds, and nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        !self.is_any_known() && self.reserved == 0
    }

    /// Whether its worker holds something that is not owed to it.
    pub(super) fn is_any_known(&self) -> bool {
        self.held.len() > self.owed.len()
    }

    /// How long to wait before tasks are looked for again that were there and locked.
    pub(super) fn locked_pause(&mut self) -> Duration {
        let pause = self.locked_pause;
        self.locked_pause = (pause * 2).min(LOCKED_LAST);
        pause
    }

    /// Nothing more is given to it.
    pub(super) fn close(&mut self) {
        self.is_closed = true;
    }

    /// After the stream's end: what its worker cannot know of, as only so many frames left.
    pub(super) fn unread_by_anyone(&mut self, frames_left: u64) -> Vec<(TaskId, i64)> {
        let has_left = |held: &Held| held.frame.is_some_and(|frame| frame.number < frames_left);
        let lost = self.held.iter().filter(|(_, held)| held.is_new && !has_left(held));
        let lost: Vec<_> = lost.map(|(task, held)| (*task, held.epoch)).collect();
        for (task, _) in &lost {
            self.remove(*task);
        }
        lost
    }
}

#[cfg(test)]
#[path = "slots_tests.rs"]
mod tests;
