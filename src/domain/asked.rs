//! What a worker asks for when it claims.

use super::ids::TaskId;

/// A task by its id, or whatever is best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// That task: the worker has heard of it.
    Task(TaskId),
    /// Whatever is best: the worker may not have read its stream for long.
    Best,
}

impl Asked {
    /// The task, if it is a certain one.
    #[must_use]
    pub fn task(self) -> Option<TaskId> {
        match self {
            Self::Task(id) => Some(id),
            Self::Best => None,
        }
    }

    /// Whether a stream is sure to wait for this. Who asks for the best may have none.
    #[must_use]
    pub fn is_urgent(self) -> bool {
        matches!(self, Self::Task(_))
    }
}
