//! Who may hear of a task and who may claim it: one predicate (protocol R1 to R3).
//!
//! It is written twice, here for the fan-out in memory and as the SQL function `task_is_for` for
//! backlog and claim; `tests/it/routing.rs` compares the two over generated cases.

use super::ids::WorkerId;
use super::limits::{self, Invalid};

/// Tasks of this codebase go to every worker.
pub const GLOBAL: &str = "global";
/// Tasks of this codebase may be claimed by any worker, before their codebase is registered.
pub const PENDING: &str = "__pending__";

/// What a worker is, as far as routing goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Routing {
    /// The worker.
    pub worker_id: WorkerId,
    /// Its agent name.
    pub name: String,
    /// Codebases it works on, sorted.
    pub codebases: Vec<String>,
    /// What it can do, sorted.
    pub capabilities: Vec<String>,
}

/// What a task asks for, as far as routing goes.
#[derive(Clone, Copy, Debug)]
pub struct TaskRouting<'a> {
    /// Its codebase.
    pub codebase_id: &'a str,
    /// What its worker must be able to do.
    pub required_capabilities: &'a [String],
    /// The one worker that it is for, if any.
    pub target_worker_id: Option<&'a str>,
    /// The one agent name that it is for, if any.
    pub target_agent_name: Option<&'a str>,
}

impl Routing {
    /// Whether this worker hears of the task and may claim it.
    #[must_use]
    pub fn matches(&self, task: TaskRouting<'_>) -> bool {
        let listed = |list: &[String], id: &str| list.iter().any(|own| own == id);
        (is_for_all(task.codebase_id) || listed(&self.codebases, task.codebase_id))
            && task.required_capabilities.iter().all(|need| listed(&self.capabilities, need))
            && task.target_worker_id.is_none_or(|id| id == self.worker_id.as_str())
            && task.target_agent_name.is_none_or(|name| name == self.name)
    }
}

/// Whether tasks of this codebase are for workers of every codebase.
#[must_use]
pub fn is_for_all(codebase_id: &str) -> bool {
    codebase_id == GLOBAL || codebase_id == PENDING
}

/// Reads a comma-separated list of a header or a query (protocol S2). Blanks around entries and
/// empty entries are dropped, so that `a, b,` is two entries and the empty text is the empty list.
pub fn parse_list(
    field: &'static str,
    text: &str,
    count_max: usize,
) -> Result<Vec<String>, Invalid> {
    let ids = text.split(',').map(str::trim).filter(|id| !id.is_empty()).map(str::to_owned);
    limits::check_ids(field, ids.collect(), count_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_trimmed_sorted_and_without_repeats() {
        let list = |text| parse_list("X-Codebases", text, 3);
        assert_eq!(list("b, a ,,b,").unwrap(), ["a", "b"]);
        assert_eq!(list("").unwrap(), [""; 0]);
        assert!(list("a b").is_err());
        assert!(list("a,b,c,d").is_err());
    }
}
