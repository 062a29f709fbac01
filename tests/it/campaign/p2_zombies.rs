//! P2: two workers never both finish a task. A zombie is a worker that slept past its lease, wakes
//! up, and goes on as if nothing had happened.

use std::collections::HashMap;

use futures_util::{StreamExt, stream};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde_json::{Value, json};

use super::Campaign;
use super::caller::{Caller, http};
use super::fleet::Fleet;
use crate::support::{TestDb, eventually};

const VERBS: [&str; 4] = ["complete", "fail", "release", "heartbeat"];
/// Zombies that call at the same time.
const AT_ONCE: usize = 32;

/// What became of the task while its first owner slept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Nobody has claimed it yet.
    Pending,
    /// It had one attempt only.
    Failed,
    /// Another worker is at it.
    Taken,
    /// Another worker has done it.
    Completed,
    /// The zombie itself has claimed it again: only the epoch tells its old claim from the new one.
    TakenBySelf,
}

struct Zombie {
    worker: String,
    task: String,
    fate: Fate,
    caller: Caller,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p2_every_stale_call_of_a_zombie_is_refused_and_changes_nothing() {
    let campaign = Campaign::new("p2_every_stale_call");
    let count = campaign.number("ZOMBIES", 100);
    let replicas = campaign.number("REPLICAS", 3);
    let lease = campaign.number("LEASE", 2).to_string();
    let fleet = Fleet::start(&campaign, replicas, &["--lease-seconds", &lease]).await;
    let http = http();
    let caller = |part, n| Caller::new(&fleet, &http, campaign.rng(part, n));

    let falling_asleep = stream::iter(0..count).map(|n| fall_asleep(n, caller("zombie", n)));
    let mut zombies: Vec<_> = falling_asleep.buffer_unordered(AT_ONCE).collect().await;
    zombies.sort_by(|one, other| one.worker.cmp(&other.worker));
    // The leases lapse: a condition on time, of which the table tells.
    eventually("every claim has lapsed", async || {
        let running = "select count(*) from tasks where status = 'running'";
        (fleet.db.value(running).await == "0").then_some(())
    })
    .await;
    stream::iter(&mut zombies).for_each_concurrent(AT_ONCE, Zombie::meets_its_fate).await;
    // From here on nothing but a zombie's call could change a row.
    fleet
        .db
        .execute(
            "update tasks set lease_expires_at = now() + interval '1 h' where status = 'running'",
        )
        .await;

    let before = rows(&fleet.db).await;
    let mut rng = campaign.rng("calls", 0);
    let mut calls: Vec<(usize, &str)> =
        (0..count).flat_map(|n| VERBS.map(|verb| (n, verb))).collect();
    calls.shuffle(&mut rng);
    let calls = stream::iter(calls).map(|(n, verb)| {
        let (zombie, caller) = (&zombies[n], caller(verb, n));
        zombie.calls(verb, caller)
    });
    let refused: Vec<bool> = calls.buffer_unordered(AT_ONCE).collect().await;
    let after = rows(&fleet.db).await;
    for (id, row) in &before {
        assert_eq!(after.get(id), Some(row), "changed by a stale call");
    }
    assert_eq!(before.len(), after.len());
    assert!(refused.iter().all(|refused| *refused));
    let late = "select sum(late_calls) from attempts where claim_epoch = 1 and outcome = 'lapsed'";
    eventually("each is counted as a late call", async || {
        (fleet.db.value(late).await == refused.len().to_string()).then_some(())
    })
    .await;
    fleet.expect_sound().await;
    campaign.figures(&format!(
        "{count} zombies over {replicas} replicas, lease {lease} s, {} stale calls, 0 accepted, all 409 claim_lost, \
         no row changed",
        refused.len()
    ));
}

/// A worker without a stream claims a task, and is not heard of any more.
async fn fall_asleep(n: usize, mut caller: Caller) -> Zombie {
    let fates =
        [Fate::Pending, Fate::Failed, Fate::Taken, Fate::Taken, Fate::Completed, Fate::TakenBySelf];
    let (worker, fate) = (format!("zombie-{n}"), fates[caller.rng.random_range(0..fates.len())]);
    register(&mut caller, &worker).await;
    let attempts = if fate == Fate::Failed { 1 } else { 2 };
    let body = json!({"title": worker, "max_attempts": attempts});
    let task = caller.ask("/v1/tasks", &body, Some(&worker)).await.remove(0).json();
    let task = task["id"].as_str().unwrap().to_owned();
    let claimed = claim(&mut caller, &task, &worker).await;
    assert_eq!(claimed["claim_epoch"], 1);
    Zombie { worker, task, fate, caller }
}

async fn register(caller: &mut Caller, worker: &str) {
    let body = json!({"worker_id": worker, "name": worker});
    caller.ask("/v1/agent/workers/register", &body, None).await;
}

async fn claim(caller: &mut Caller, task: &str, worker: &str) -> Value {
    let body = json!({"worker_id": worker, "claim_id": caller.uuid()});
    caller.ask(&format!("/v1/tasks/{task}/claim"), &body, None).await.remove(0).expect(200)
}

impl Zombie {
    async fn meets_its_fate(&mut self) {
        let heir = format!("heir-of-{}", self.worker);
        let owner = match self.fate {
            Fate::Pending | Fate::Failed => return,
            Fate::Taken | Fate::Completed => heir.as_str(),
            Fate::TakenBySelf => &self.worker,
        };
        register(&mut self.caller, owner).await;
        let epoch = claim(&mut self.caller, &self.task, owner).await["claim_epoch"].clone();
        assert_eq!(epoch, 2);
        if self.fate == Fate::Completed {
            let body = json!({"worker_id": owner, "claim_epoch": epoch, "result": "the heir's"});
            let path = format!("/v1/tasks/{}/complete", self.task);
            self.caller.ask(&path, &body, None).await.remove(0).expect(200);
        }
    }

    /// Whether the call was refused as it must be.
    async fn calls(&self, verb: &str, mut caller: Caller) -> bool {
        let body = body_of(verb, &self.worker, &mut caller.rng);
        let path = format!("/v1/tasks/{}/{verb}", self.task);
        let answer = caller.ask(&path, &body, None).await.remove(0);
        let refused = answer.status == 409
            && answer.problem() == "claim_lost"
            && answer.json()["outcome"] == "lapsed";
        if !refused {
            caller.fleet.tally.violation(format!("{verb} of {}: {answer:?}", self.worker));
        }
        refused
    }
}

fn body_of(verb: &str, worker: &str, rng: &mut StdRng) -> Value {
    let mut body = json!({"worker_id": worker, "claim_epoch": 1});
    match verb {
        "complete" => body["result"] = json!("the zombie's"),
        "fail" => {
            body["error"] = json!("the zombie's");
            body["retry"] = json!(rng.random::<bool>());
        }
        "heartbeat" => {
            body["progress"] = json!(0.9);
            body["message"] = json!("the zombie's");
            body["checkpoint"] = json!({"of": "the zombie"});
        }
        _ => {}
    }
    body
}

/// Every row, whole.
async fn rows(db: &TestDb) -> HashMap<String, Value> {
    let rows = db.value("select json_object_agg(id, to_jsonb(t)) from tasks t").await;
    serde_json::from_str(&rows).expect("rows")
}
