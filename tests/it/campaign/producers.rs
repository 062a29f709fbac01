//! Producers: they create tasks, one by one under a key or as a batch, and write down every yes.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rand::RngExt;
use serde_json::{Value, json};

use super::caller::Caller;
use super::ledger::Ledger;

/// Groups of tasks and workers: a task is announced to the workers of its group only.
pub const GROUPS: usize = 12;
/// Tasks of a batch, at most.
const BATCH_MAX: usize = 40;
/// More than any task needs: what is failed on purpose, lapsed or requeued is always tried again.
pub const ATTEMPTS: i64 = 1_000;

/// Creates `count` acknowledged tasks over about as long as `during`.
pub async fn produce(
    mut caller: Caller,
    name: String,
    ledger: Arc<Ledger>,
    count: usize,
    during: Duration,
) {
    let begun = Instant::now();
    let mut made = 0;
    while made < count {
        made += some(&mut caller, &format!("{name}-{made}"), &ledger, count - made).await;
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let due = during.mul_f64(made as f64 / count as f64);
        tokio::time::sleep(due.saturating_sub(begun.elapsed())).await;
    }
}

/// Creates one task, or a batch of at most `most`. Half of the tasks come in batches.
pub async fn some(caller: &mut Caller, name: &str, ledger: &Ledger, most: usize) -> usize {
    let size = if caller.chance(95) { 1 } else { caller.rng.random_range(2..=BATCH_MAX) };
    let size = size.min(most);
    if size == 1 {
        let body = task(caller, name);
        create(caller, &body, ledger).await;
    } else {
        create_all(caller, name, size, ledger).await;
    }
    size
}

/// Creates one task, under its title as key.
pub async fn create(caller: &mut Caller, body: &Value, ledger: &Ledger) {
    let title = body["title"].as_str().unwrap_or_default();
    let mut ids = Vec::new();
    for answer in caller.ask("/v1/tasks", body, Some(title)).await {
        let task = answer.json();
        if !matches!(answer.status, 200 | 201) || task["title"] != title {
            ledger.violation(format!("created as {title}: {answer:?}"));
            continue;
        }
        ids.push(task["id"].as_str().unwrap_or_default().to_owned());
        ledger.created(ids.last().unwrap(), title);
    }
    if ids.windows(2).any(|two| two[0] != two[1]) {
        ledger.violation(format!("one key, two tasks: {ids:?}"));
    }
}

/// A batch has no key: one that got no answer may be there or not, and is made again.
async fn create_all(caller: &mut Caller, name: &str, size: usize, ledger: &Ledger) {
    for attempt in 0.. {
        let name = format!("{name}-try-{attempt}");
        let titles: Vec<_> = (0..size).map(|n| format!("{name}/{n}")).collect();
        let tasks: Vec<_> = titles.iter().map(|title| task(caller, title)).collect();
        // Only one of two answers could be kept apart from the other, so this is never doubled.
        let server = caller.any();
        let answer = caller.send(&server, "/v1/tasks/batch", &json!(tasks), None).await;
        let Some(answer) = answer else {
            ledger.batch_unanswered(&name, size);
            caller.pause(10, 100).await;
            continue;
        };
        let ids = answer.json()["ids"].clone();
        let ids: Vec<&str> =
            ids.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if answer.status != 201 || ids.len() != size {
            ledger.violation(format!("batch {name}: {answer:?}"));
        }
        for (id, title) in ids.iter().zip(&titles) {
            ledger.created(id, title);
        }
        return;
    }
}

fn task(caller: &mut Caller, title: &str) -> Value {
    let group = caller.rng.random_range(0..GROUPS);
    let priority = caller.rng.random_range(0..10);
    let mut task = json!({
        "title": title, "codebase_id": format!("group-{group}"), "priority": priority,
        "max_attempts": ATTEMPTS,
    });
    if caller.chance(5) {
        // The wire has points in time here; a clock that is wrong costs some seconds.
        let soon = SystemTime::now() + Duration::from_millis(caller.rng.random_range(0..3_000));
        task["run_at"] = json!(chrono::DateTime::<chrono::Utc>::from(soon).to_rfc3339());
    }
    task
}
