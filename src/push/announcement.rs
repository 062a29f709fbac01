//! A claimable task as it is told.

use super::frames::TaskFrames;
use crate::store::{PushTask, Ready};

/// A claimable task with its frames, ready for any number of streams.
#[derive(Debug)]
pub struct Announcement {
    pub(super) push: PushTask,
    pub(super) frames: TaskFrames,
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

    /// Whether the hub finds the same streams for both.
    pub(super) fn concerns_the_same(&self, other: &Self) -> bool {
        let (task, other) = (&self.push.task, &other.push.task);
        task.codebase_id == other.codebase_id && task.target_worker_id == other.target_worker_id
    }

    pub(super) fn priority(&self) -> i32 {
        self.push.task.priority
    }
}
