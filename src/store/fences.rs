//! The fences of a batch as the columns of a statement.

use uuid::Uuid;

use crate::domain::Fence;

#[derive(Debug, Default)]
pub(super) struct Fences<'a> {
    pub(super) tasks: Vec<Uuid>,
    pub(super) workers: Vec<&'a str>,
    pub(super) epochs: Vec<Option<i64>>,
}

impl<'a> FromIterator<&'a Fence> for Fences<'a> {
    fn from_iter<I: IntoIterator<Item = &'a Fence>>(fences: I) -> Self {
        let mut columns = Self::default();
        for fence in fences {
            columns.tasks.push(fence.task_id.0);
            columns.workers.push(fence.worker_id.as_str());
            columns.epochs.push(fence.claim_epoch);
        }
        columns
    }
}
