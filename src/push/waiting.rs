//! What is held back from a stream.

/// What is held back: it stays in Postgres, and is read from there when there is room.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Grows with each task that is held back.
    pub(super) held_back: u64,
    /// `held_back` as it was when the backlog was last read to its end.
    pub(super) settled: u64,
    /// The highest priority of what is held back. A new task that matters no more waits behind it,
    /// or arrivals would starve the backlog.
    pub(super) behind: Option<i32>,
    /// The same, of what was held back since the present read of the backlog began.
    pub(super) behind_next: Option<i32>,
}

impl Waiting {
    pub(super) fn hold(&mut self, priority: Option<i32>) {
        self.held_back += 1;
        self.behind = self.behind.max(priority);
        self.behind_next = self.behind_next.max(priority);
    }

    pub(super) fn is_any(&self) -> bool {
        self.held_back > self.settled
    }

    /// Whether a task matters more than all that is held back.
    pub(super) fn is_urgent(&self, priority: i32) -> bool {
        self.is_any() && self.behind.is_some_and(|behind| priority > behind)
    }

    pub(super) fn goes_before(&self, priority: i32) -> bool {
        self.is_any() && self.behind >= Some(priority)
    }
}
