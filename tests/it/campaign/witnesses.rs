//! Witnesses: for each replica one worker that does nothing but hear, of tasks that are made on
//! another replica, so that the way through Postgres is measured (P6) and no worker's own business.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rand::RngExt;
use serde_json::json;
use tokio::sync::mpsc;

use super::caller::Caller;
use super::larger::More;
use super::ledger::result;
use super::producers::{ATTEMPTS, create};
use super::weather::Class;
use super::workers::Control;
use crate::support::SseStream;

/// Between two tasks of one witness, in ms.
const EVERY_MS: std::ops::Range<u64> = 200..400;
/// What is announced later than this, with nothing broken but announcements, is a violation. P6 says
/// 2 s; the rest is for a machine on which everything runs at once.
const UNHEARD_MAX: Duration = Duration::from_secs(4);

/// Makes tasks for the witness `n` until told to stop.
pub async fn make(mut caller: Caller, n: usize, more: Arc<More>, control: Arc<Control>) {
    for made in 0.. {
        if control.is_closing() {
            return;
        }
        let body = json!({
            "title": format!("witnessed-{n}-{made}"), "codebase_id": format!("witness-{n}"),
            "max_attempts": ATTEMPTS,
        });
        create(&mut caller, &body, &more.ledger).await;
        let ms = caller.rng.random_range(EVERY_MS);
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}

/// Hears of them, on the replica `n`, and hands them on.
pub async fn hear(
    n: usize,
    world: Arc<super::faults::World>,
    more: Arc<More>,
    heard: mpsc::UnboundedSender<String>,
) {
    let server = format!("http://{}", world.fleet.slots[n].streams.address);
    let query = format!("worker_id=witness-{n}&events=task_available&codebases=witness-{n}");
    loop {
        let Some(mut stream) = SseStream::try_open(&more.streams, &server, &query).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        while let Some(event) = stream.read().await {
            if event.name != "task_available" {
                continue;
            }
            let created = event.data["created_at"].as_str().unwrap_or_default();
            let created = chrono::DateTime::parse_from_rfc3339(created).map(SystemTime::from);
            let sample = created.ok().and_then(|created| more.weather.announced(created));
            if let Some((Class::Unheard, delay)) = sample.filter(|(_, delay)| *delay > UNHEARD_MAX)
            {
                more.ledger.violation(format!("announced after {delay:?} (P6): {event:?}"));
            }
            if heard.send(event.task().to_owned()).is_err() {
                return;
            }
        }
    }
}

/// Does what was heard of.
pub async fn work(
    mut caller: Caller,
    n: usize,
    more: Arc<More>,
    mut heard: mpsc::UnboundedReceiver<String>,
) {
    let me = format!("witness-{n}");
    while let Some(task) = heard.recv().await {
        more.ledger.claim_asked(&task);
        let claim_id = caller.uuid();
        let body = json!({"worker_id": me, "claim_id": claim_id});
        let answers = caller.ask(&format!("/v1/tasks/{task}/claim"), &body, None).await;
        let Some(won) = answers.iter().find(|answer| answer.status == 200) else { continue };
        let epoch = won.json()["claim_epoch"].as_i64().unwrap_or_default();
        more.ledger.claimed(&task, epoch, &me, &claim_id);
        more.ledger.completion_sent(&task, epoch, &me);
        let body =
            json!({"worker_id": me, "claim_epoch": epoch, "result": result(&task, epoch, &me)});
        let answers = caller.ask(&format!("/v1/tasks/{task}/complete"), &body, None).await;
        if answers.iter().any(|answer| answer.status == 200) {
            more.ledger.completed(&task, epoch);
        } else {
            more.ledger.claim_lost();
        }
    }
}
