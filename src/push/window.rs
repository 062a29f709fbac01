//! What one stream has been told of and not settled yet (protocol S8): pure bookkeeping.
//!
//! A worker may execute inside its read loop and not read for hours. The window keeps what is on
//! its way to it small enough for its socket, and lets what matters more through.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::unread::{Mark, Unread};
use crate::domain::TaskId;
use crate::store::Ready;

/// Bytes of outstanding announcements at which a window is full.
pub const WINDOW_BYTES: usize = 32 * 1024;
/// Settled announcements that a window remembers, so that a late read does not repeat them (S5), and how
/// far a claim of one proves reading. An announcement has 200 bytes at least: all unread ones are among them.
const REMEMBERED_MAX: usize = 256;
/// An announcement that nobody acted on is repeated after this long, then at growing intervals (S6).
const REPEAT_FIRST: Duration = Duration::from_mins(1);
/// A repeat that could not be told is tried again after this long.
const REPEAT_RETRY: Duration = Duration::from_secs(2);
/// A repeat for which there is no room is thought of again after this long.
const REPEAT_NO_ROOM: Duration = Duration::from_secs(5);
/// The longest of these intervals.
const REPEAT_LAST: Duration = Duration::from_mins(10);

/// One stream's window.
#[derive(Debug)]
pub struct Window {
    size: usize,
    outstanding: HashMap<TaskId, Announced>,
    bytes: usize,
    remembered: VecDeque<Remembered>,
    /// The tails of their ids, in the same order: nearly always it is enough to look through these.
    tails: VecDeque<u32>,
    /// When the first repeat of all outstanding ones is due, or earlier.
    next_repeat: Option<Instant>,
    /// What its worker may not have read yet.
    unread: Unread,
    /// Something is held back until the worker is proven to have read more.
    is_unread: bool,
    /// So is something that is to be repeated.
    has_unread_repeat: bool,
}

#[derive(Debug)]
struct Announced {
    xid: i64,
    priority: i32,
    bytes: usize,
    repeat_at: Instant,
    repeat_after: Duration,
    place: Place,
}

/// Where an announcement stands in its stream.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// A claim of the task proves reading up to there.
    mark: Mark,
    /// If it came after this.
    told_at: Instant,
}

#[derive(Debug)]
struct Remembered {
    ready: Ready,
    place: Place,
}

/// What a window says to an announcement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is room: send it and [`Window::note`] it.
    Announce,
    /// This stream knows.
    Known,
    /// It knows, but is to be told again: like `Announce`, and it takes its own place.
    Again,
    /// It knows of an earlier time that the task could be claimed: news, which takes that one's place.
    Anew,
    /// No room: it waits in Postgres.
    HoldBack,
    /// The same, until the worker has read more.
    Unread,
}

impl Window {
    /// An empty window of so many announcements.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self {
            size,
            outstanding: HashMap::new(),
            bytes: 0,
            remembered: VecDeque::new(),
            tails: VecDeque::new(),
            next_repeat: None,
            unread: Unread::default(),
            is_unread: false,
            has_unread_repeat: false,
        }
    }

    /// Whether to announce. Full is counted among tasks of this priority or higher, so that more
    /// important work passes less important; never more than twice the window in all. `is_urgent`: it
    /// is more important than all that is held back.
    #[must_use]
    pub fn consider(&self, offer: Offered, now: Instant) -> Verdict {
        let verdict = self.consider_outstanding(offer.ready, offer.priority, now);
        let waits = match verdict {
            Verdict::Known | Verdict::HoldBack | Verdict::Unread => return verdict,
            Verdict::Again => Verdict::Known,
            Verdict::Announce | Verdict::Anew => Verdict::Unread,
        };
        // What waits for a proof goes before what is smaller and would fit.
        let may_pass = !self.is_unread || offer.is_urgent;
        let earlier = self.unread_place(offer.ready.id).map(|place| place.mark);
        let fits = may_pass && self.unread.fits(offer.bytes, offer.is_urgent, earlier);
        if fits { verdict } else { waits }
    }

    fn consider_outstanding(&self, ready: Ready, priority: i32, now: Instant) -> Verdict {
        if let Some(known) = self.outstanding.get(&ready.id) {
            // The same announcement again, or an older one out of order; unless its repeat is due.
            // What is told anew takes its own place, so there is room for it.
            return if ready.xid > known.xid {
                Verdict::Anew
            } else if now < known.repeat_at {
                Verdict::Known
            } else {
                Verdict::Again
            };
        }
        if self.remembered_of(ready.id).any(|known| known.ready == ready) {
            return Verdict::Known;
        }
        if self.outstanding.len() < self.size && self.bytes < WINDOW_BYTES {
            return Verdict::Announce;
        }
        if self.outstanding.len() >= 2 * self.size || self.bytes >= 2 * WINDOW_BYTES {
            return Verdict::HoldBack;
        }
        let (count, bytes) = self
            .outstanding
            .values()
            .filter(|known| known.priority >= priority)
            .fold((0, 0), |(count, bytes), known| (count + 1, bytes + known.bytes));
        if count < self.size && bytes < WINDOW_BYTES {
            Verdict::Announce
        } else {
            Verdict::HoldBack
        }
    }

    /// Notes what was sent.
    pub fn note(&mut self, offer: Offered, now: Instant) {
        let Offered { ready, priority, bytes, .. } = offer;
        let earlier = self.unread_place(ready.id);
        let mark = self.unread.announced(bytes, earlier.map(|place| place.mark));
        // Which of two announcements the worker has read when it claims the task, it does not say.
        let place = earlier.unwrap_or(Place { mark, told_at: now });
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let repeat_after = match self.outstanding.remove(&ready.id) {
            Some(before) => {
                self.bytes -= before.bytes;
                if before.xid == ready.xid {
                    (before.repeat_after * 2).min(REPEAT_LAST)
                } else {
                    REPEAT_FIRST
                }
            }
            None => REPEAT_FIRST,
        };
        let repeat_at = now + repeat_after;
        self.next_repeat = Some(self.next_repeat.map_or(repeat_at, |at| at.min(repeat_at)));
        self.bytes += bytes;
        self.outstanding.insert(
            ready.id,
            Announced { xid: ready.xid, priority, bytes, repeat_at, repeat_after, place },
        );
    }

    /// Notes a task that was pushed without being announced, and where it stands in the stream.
    pub fn note_pushed(&mut self, bytes: u64) -> Mark {
        self.unread.announced(bytes, None)
    }

    /// Bytes of tasks that may be pushed until the worker has read more.
    #[must_use]
    pub fn room_bytes(&self) -> u64 {
        self.unread.room_bytes()
    }

    /// The worker acted on a task that stands there.
    pub fn prove_mark(&mut self, mark: Mark) {
        self.unread.prove(mark);
    }

    /// The worker has read everything.
    pub fn prove_all(&mut self) {
        self.unread.prove_all();
    }

    /// Notes bytes that announce nothing.
    pub fn note_other(&mut self, bytes: u64) {
        self.unread.sent_other(bytes);
    }

    /// Whether there is room for a keepalive of so many bytes, which is noted then.
    pub fn note_keepalive(&mut self, bytes: u64) -> bool {
        let has_room = self.unread.has_room_for_others(bytes);
        if has_room {
            self.unread.sent_other(bytes);
        }
        has_room
    }

    /// Something waits until the worker has read more.
    pub fn wait_for_proof(&mut self) {
        self.is_unread = true;
    }

    /// Whether something, if only a repeat, waits until the worker has read more.
    #[must_use]
    pub fn waits_for_proof(&self) -> bool {
        self.is_unread || self.has_unread_repeat
    }

    /// The worker asked for a task by its id at that time: it has read its stream as far as what it was
    /// told of it until then.
    pub fn prove(&mut self, id: TaskId, asked_at: Instant) {
        let place = self.unread_place(id).filter(|place| place.told_at <= asked_at);
        self.prove_place(place);
    }

    /// The worker has read all that it was told until then.
    pub fn prove_until(&mut self, at: Instant) {
        let told = self.places().filter(|place| place.told_at <= at);
        let last = told.max_by_key(|place| place.mark);
        self.prove_place(last);
    }

    fn prove_place(&mut self, place: Option<Place>) {
        if let Some(place) = place
            && self.unread.prove(place.mark)
            && self.unread.has_room()
        {
            self.is_unread = false;
        }
    }

    /// Where all that it was told of late stands.
    fn places(&self) -> impl Iterator<Item = Place> {
        let outstanding = self.outstanding.values().map(|known| known.place);
        outstanding.chain(self.remembered.iter().map(|known| known.place))
    }

    /// What is remembered of one task.
    fn remembered_of(&self, id: TaskId) -> impl Iterator<Item = &Remembered> {
        let (front, back) = self.tails.as_slices();
        let is_there = front.contains(&tail(id)) || back.contains(&tail(id));
        let remembered = is_there.then(|| self.remembered.iter()).into_iter().flatten();
        remembered.filter(move |known| known.ready.id == id)
    }

    /// The first announcement of a task that the worker may not have read.
    fn unread_place(&self, id: TaskId) -> Option<Place> {
        let outstanding = self.outstanding.get(&id).map(|known| known.place);
        let remembered = self.remembered_of(id).map(|known| known.place);
        let places = outstanding.into_iter().chain(remembered);
        places.filter(|place| !self.unread.is_read(place.mark)).min_by_key(|place| place.mark)
    }

    /// The worker could not claim a task because its row was locked: it is to be told again soon.
    pub fn hasten(&mut self, id: TaskId, now: Instant) {
        if let Some(known) = self.outstanding.get_mut(&id) {
            known.repeat_at = known.repeat_at.min(now + REPEAT_RETRY);
            let at = known.repeat_at;
            self.next_repeat = Some(self.next_repeat.map_or(at, |next| next.min(at)));
        }
    }

    /// Takes out what can no longer be claimed, or what the worker acted on. Whether it was there.
    pub fn settle(&mut self, id: TaskId) -> bool {
        let Some(known) = self.take_out(id) else {
            return false;
        };
        if self.remembered.len() == REMEMBERED_MAX {
            self.remembered.pop_front();
            self.tails.pop_front();
        }
        let ready = Ready { id, xid: known.xid };
        self.tails.push_back(tail(id));
        self.remembered.push_back(Remembered { ready, place: known.place });
        true
    }

    /// Takes out what the worker was told of and may not claim: the same announcement will be news to it.
    pub fn unsay(&mut self, id: TaskId) {
        self.take_out(id);
    }

    fn take_out(&mut self, id: TaskId) -> Option<Announced> {
        let known = self.outstanding.remove(&id)?;
        self.bytes -= known.bytes;
        Some(known)
    }

    /// Whether the worker was told of this, and has not acted on it.
    #[must_use]
    pub fn has(&self, ready: Ready) -> bool {
        self.outstanding.get(&ready.id).is_some_and(|known| known.xid >= ready.xid)
    }

    /// How many announcements are outstanding.
    #[must_use]
    pub fn count(&self) -> usize {
        self.outstanding.len()
    }

    /// Whether a quarter is free: worth asking Postgres for more.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.is_unread
            && self.outstanding.len() * 4 <= self.size * 3
            && self.bytes * 4 <= WINDOW_BYTES * 3
    }

    /// All that is outstanding, by announcement.
    pub fn outstanding(&self) -> impl Iterator<Item = Ready> {
        self.outstanding.iter().map(|(id, known)| Ready { id: *id, xid: known.xid })
    }

    /// What nobody acted on for so long that it is to be told again. Asked about again soon, until
    /// it was noted or settled.
    pub fn to_repeat(&mut self, now: Instant) -> Vec<Ready> {
        if self.next_repeat.is_none_or(|at| now < at) {
            return Vec::new();
        }
        let is_late = |known: &Announced| known.repeat_at <= now;
        let has_room = |known: &Announced| {
            let earlier = Some(known.place.mark).filter(|mark| !self.unread.is_read(*mark));
            !self.is_unread && self.unread.fits(known.bytes as u64, false, earlier)
        };
        let next = |known: &Announced| match known {
            known if !is_late(known) => known.repeat_at,
            known if has_room(known) => now + REPEAT_RETRY,
            _ => now + REPEAT_NO_ROOM,
        };
        let next_repeat = self.outstanding.values().map(next).min();
        let late = self.outstanding.iter().filter(|(_, known)| is_late(known) && has_room(known));
        let late = late.map(|(id, known)| Ready { id: *id, xid: known.xid }).collect();
        let has_unread_repeat =
            self.outstanding.values().any(|known| is_late(known) && !has_room(known));
        self.next_repeat = next_repeat;
        self.has_unread_repeat = has_unread_repeat;
        late
    }
}

/// The last bits of an id: those that are random.
fn tail(id: TaskId) -> u32 {
    let [.., a, b, c, d] = *id.0.as_bytes();
    u32::from_be_bytes([a, b, c, d])
}

/// An announcement that may be sent.
#[derive(Clone, Copy, Debug)]
pub struct Offered {
    /// Which announcement of which task it is.
    pub ready: Ready,
    /// The task's priority.
    pub priority: i32,
    /// What it takes on its way.
    pub bytes: u64,
    /// It is more important than all that is held back.
    pub is_urgent: bool,
}

#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
