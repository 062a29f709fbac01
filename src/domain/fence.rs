//! The fence around a claim.

use super::ids::{TaskId, WorkerId};

/// Names one claim. Everything that a worker does to a task after claiming it takes one, and the
/// statement that does it matches no row once that claim is over. The number decides, not a clock: a
/// worker that was overtaken holds an epoch that no row will have again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The task.
    pub task_id: TaskId,
    /// Who claimed it.
    pub worker_id: WorkerId,
    /// Which claim; not given: whatever claim this worker has on the task.
    pub claim_epoch: Option<i64>,
}
