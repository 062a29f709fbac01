//! Calls of claims that are over: what the caller is told, and the mark that they leave.

use serde::Serialize;

use super::StoreError;
use super::fences::Fences;
use super::link::Link;
use crate::domain::{Fence, Status};

/// Why a call's fence matched nothing.
#[derive(Clone, Debug)]
pub(super) enum Late {
    /// There is no such task.
    NotFound,
    /// A complete that had been done before, of this claim and at this attempt.
    Repeats(Past),
    /// The claim is over.
    Lost(Lost),
    /// It lives: its row was locked by somebody else.
    Locked,
}

/// A claim that had its `complete`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Past {
    pub(super) claim_epoch: i64,
    pub(super) attempt: i32,
    pub(super) max_attempts: i32,
}

/// A claim that is over: where its task stands now, and how the claim ended.
#[derive(Clone, Debug, Serialize)]
pub struct Lost {
    /// What the task is now.
    #[serde(rename = "task_status")]
    pub status: Status,
    /// Whose it is or was last.
    pub claimed_by: Option<String>,
    /// The epoch of its newest claim.
    pub claim_epoch: i64,
    /// How the caller's claim ended, in the words of `attempts.outcome`; `None`: the caller had none.
    pub outcome: Option<String>,
}

/// Explains some calls, each with whether it is a `complete`. In the order of the calls.
pub(super) async fn explain(
    link: &Link,
    calls: &[(&Fence, bool)],
) -> Result<Vec<Late>, StoreError> {
    if calls.is_empty() {
        return Ok(Vec::new());
    }
    let fences: Fences<'_> = calls.iter().map(|(fence, _)| *fence).collect();
    let completes: Vec<_> = calls.iter().map(|(_, completes)| *completes).collect();
    let rows = sqlx::query_file!(
        "src/store/sql/task_late.sql",
        &fences.tasks,
        &fences.workers as &[&str],
        &fences.epochs as &[Option<i64>],
        &completes,
    )
    .fetch_all(link)
    .await?;
    let mut answers: Vec<Late> = calls.iter().map(|_| Late::NotFound).collect();
    for row in rows {
        let Some(answer) = usize::try_from(row.n - 1).ok().and_then(|n| answers.get_mut(n)) else {
            continue;
        };
        let (Some(status), Some(claim_epoch), Some(max_attempts)) =
            (row.status, row.claim_epoch, row.max_attempts)
        else {
            continue;
        };
        *answer = match (row.past_epoch, row.past_attempt) {
            (Some(claim_epoch), Some(attempt)) if row.repeats => {
                Late::Repeats(Past { claim_epoch, attempt, max_attempts })
            }
            _ if row.holds => Late::Locked,
            _ => {
                let (claimed_by, outcome) = (row.claimed_by, row.outcome);
                Late::Lost(Lost { status, claimed_by, claim_epoch, outcome })
            }
        };
    }
    Ok(answers)
}
