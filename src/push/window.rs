//! What one stream has been told of and not settled yet (protocol S8): pure bookkeeping.
//!
//! A worker may execute inside its read loop and not read for hours. The window keeps what is on
//! its way to it small enough for its socket, and lets what matters more through.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::domain::TaskId;
use crate::store::Ready;

/// Bytes of outstanding announcements at which a window is full.
pub const WINDOW_BYTES: usize = 32 * 1024;
/// Settled announcements that a window remembers, so that a late read does not repeat them (S5).
const REMEMBERED_MAX: usize = 256;
/// An announcement that nobody acted on is repeated after this long, then at growing intervals (S6).
const REPEAT_FIRST: Duration = Duration::from_mins(1);
/// A repeat that could not be told is tried again after this long.
const REPEAT_RETRY: Duration = Duration::from_secs(2);
/// The longest of these intervals.
const REPEAT_LAST: Duration = Duration::from_mins(10);

/// One stream's window.
#[derive(Debug)]
pub struct Window {
    size: usize,
    outstanding: HashMap<TaskId, Announced>,
    bytes: usize,
    remembered: VecDeque<Ready>,
    /// When the first repeat of all outstanding ones is due, or earlier.
    next_repeat: Option<Instant>,
}

#[derive(Debug)]
struct Announced {
    xid: i64,
    priority: i32,
    bytes: usize,
    repeat_at: Instant,
    repeat_after: Duration,
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
            next_repeat: None,
        }
    }

    /// Whether to announce. Full is counted among tasks of this priority or higher, so that more
    /// important work passes less important; never more than twice the window in all.
    #[must_use]
    pub fn consider(&self, ready: Ready, priority: i32, now: Instant) -> Verdict {
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
        if self.remembered.contains(&ready) {
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
    pub fn note(&mut self, ready: Ready, priority: i32, bytes: usize, now: Instant) {
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
            Announced { xid: ready.xid, priority, bytes, repeat_at, repeat_after },
        );
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
        let Some(known) = self.outstanding.remove(&id) else {
            return false;
        };
        self.bytes -= known.bytes;
        if self.remembered.len() == REMEMBERED_MAX {
            self.remembered.pop_front();
        }
        self.remembered.push_back(Ready { id, xid: known.xid });
        true
    }

    /// Whether a quarter is free: worth asking Postgres for more.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.outstanding.len() * 4 <= self.size * 3 && self.bytes * 4 <= WINDOW_BYTES * 3
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
        let next = |known: &Announced| {
            if known.repeat_at > now { known.repeat_at } else { now + REPEAT_RETRY }
        };
        self.next_repeat = self.outstanding.values().map(next).min();
        let late = self.outstanding.iter().filter(|(_, known)| known.repeat_at <= now);
        late.map(|(id, known)| Ready { id: *id, xid: known.xid }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(xid: i64) -> Ready {
        Ready { id: TaskId::generate(), xid }
    }

    fn filled(size: usize, priority: i32, now: Instant) -> (Window, Vec<Ready>) {
        let mut window = Window::new(size);
        let tasks: Vec<_> = (0..size).map(|_| ready(1)).collect();
        for task in &tasks {
            assert_eq!(window.consider(*task, priority, now), Verdict::Announce);
            window.note(*task, priority, 100, now);
        }
        (window, tasks)
    }

    #[test]
    fn a_full_window_holds_back_its_own_priority_and_lets_higher_pass() {
        let now = Instant::now();
        let (mut window, _) = filled(4, 0, now);
        assert_eq!(window.consider(ready(1), 0, now), Verdict::HoldBack);
        assert_eq!(window.consider(ready(1), -1, now), Verdict::HoldBack);
        for _ in 0..4 {
            let urgent = ready(1);
            assert_eq!(window.consider(urgent, 1, now), Verdict::Announce);
            window.note(urgent, 1, 100, now);
        }
        assert_eq!(window.consider(ready(1), 2, now), Verdict::HoldBack, "twice the window in all");
    }

    #[test]
    fn bytes_fill_a_window_too() {
        let now = Instant::now();
        let mut window = Window::new(128);
        window.note(ready(1), 0, 16 * 1024, now);
        window.note(ready(1), 0, 16 * 1024, now);
        assert_eq!(window.consider(ready(1), 0, now), Verdict::HoldBack);
    }

    #[test]
    fn an_announcement_is_not_repeated_within_a_minute_settled_or_not() {
        let now = Instant::now();
        let (mut window, tasks) = filled(4, 0, now);
        assert_eq!(window.consider(tasks[0], 0, now + Duration::from_secs(59)), Verdict::Known);
        assert!(window.settle(tasks[0].id));
        assert!(!window.settle(tasks[0].id));
        assert_eq!(window.consider(tasks[0], 0, now), Verdict::Known);
    }

    #[test]
    fn a_task_that_came_back_is_announced_anew() {
        let now = Instant::now();
        let (mut window, tasks) = filled(4, 0, now);
        window.settle(tasks[0].id);
        let again = Ready { xid: 2, ..tasks[0] };
        assert_eq!(window.consider(again, 0, now), Verdict::Announce);
    }

    #[test]
    fn a_task_that_came_back_is_news_while_its_earlier_announcement_is_outstanding() {
        let now = Instant::now();
        let (mut window, tasks) = filled(4, 0, now);
        let again = Ready { xid: 2, ..tasks[0] };
        assert_eq!(window.consider(again, 0, now), Verdict::Anew);
        window.note(again, 0, 100, now);
        assert_eq!(window.consider(again, 0, now), Verdict::Known);
    }

    #[test]
    fn a_task_whose_row_was_locked_is_told_again_soon() {
        let now = Instant::now();
        let (mut window, tasks) = filled(4, 0, now);
        window.hasten(tasks[0].id, now);
        assert!(window.to_repeat(now + REPEAT_RETRY / 2).is_empty());
        assert_eq!(window.to_repeat(now + REPEAT_RETRY), [tasks[0]]);
    }

    #[test]
    fn a_full_window_repeats_too_and_a_repeat_that_failed_is_tried_again() {
        let now = Instant::now();
        let (mut window, tasks) = filled(1, 0, now);
        let later = now + Duration::from_mins(1);
        assert_eq!(window.to_repeat(later), tasks);
        assert_eq!(window.consider(tasks[0], 0, later), Verdict::Again);
        assert!(window.to_repeat(later + Duration::from_secs(1)).is_empty());
        let later = later + REPEAT_RETRY;
        assert_eq!(window.to_repeat(later), tasks, "it was not noted");
        window.note(tasks[0], 0, 100, later);
        assert!(window.to_repeat(later + REPEAT_RETRY).is_empty());
    }

    #[test]
    fn repeats_come_after_a_minute_then_at_growing_intervals() {
        let mut now = Instant::now();
        let mut window = Window::new(4);
        let task = ready(1);
        window.note(task, 0, 100, now);
        for wait in [60, 120, 240, 480, 600, 600] {
            assert!(window.to_repeat(now + Duration::from_secs(wait - 1)).is_empty());
            now += Duration::from_secs(wait);
            assert_eq!(window.to_repeat(now), [task]);
            assert_eq!(window.consider(task, 0, now), Verdict::Again);
            window.note(task, 0, 100, now);
        }
    }
}
