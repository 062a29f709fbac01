//! P4: a dropped connection never costs you a task or runs it twice. A gremlin cuts answers at any
//! byte; the client sends the same call again, with the same key, until it has an answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use serde_json::{Value, json};

use super::Campaign;
use super::caller::{Caller, http_without_reuse};
use super::fleet::Fleet;
use super::gremlin::Trick;
use crate::support::{Answer, Replica, TestDb, eventually};

/// Clients at the same time, each with one task after the other.
const CLIENTS: usize = 16;
/// Half of all answers and requests that the tricks are about.
const PERCENT: u32 = 50;
const TRICKS: [Trick; 3] = [Trick::CutAnswer, Trick::ResetAnswer, Trick::HangUp];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p4_cut_answers_cost_no_task_and_run_none_twice() {
    let campaign = Campaign::new("p4_cut_answers");
    let target = campaign.number("CUTS", 300);
    let fleet = Fleet::start(&campaign, campaign.number("REPLICAS", 2), &[]).await;
    let (http, tasks) = (http_without_reuse(), Arc::new(AtomicUsize::new(0)));
    let direct = direct(&fleet).await;
    let mut clients = Vec::new();
    for n in 0..CLIENTS {
        let caller = Caller::new(&fleet, &http, campaign.rng("client", n));
        let (worker, direct) = (format!("client-{n}"), direct[n % direct.len()].clone());
        let body = json!({"worker_id": worker, "name": worker});
        caller.send(&direct, "/v1/agent/workers/register", &body, None).await.unwrap().expect(200);
        clients.push(Client { caller, worker, direct, tasks: Arc::clone(&tasks) });
    }
    fleet.slots.iter().for_each(|slot| slot.calls.play(&TRICKS, PERCENT));
    let until_enough = clients.iter_mut().map(async |client| {
        while cuts(&fleet)[0] < target {
            client.does_a_task().await;
        }
    });
    join_all(until_enough).await;

    let tasks = tasks.load(Ordering::Relaxed);
    let [answers, requests] = cuts(&fleet);
    let (total, epochs) = ("select count(*) from tasks", "select sum(claim_epoch) from tasks");
    let done = "select count(*) from tasks where status = 'completed' and attempt = 1
                   and result->>'by' = claimed_by and result->>'key' = idempotency_key";
    for (what, sql) in [("made", total), ("claims", epochs), ("completed", done)] {
        assert_eq!(fleet.db.value(sql).await, tasks.to_string(), "{what}, of {tasks} tasks");
    }
    fleet.expect_sound().await;
    campaign.figures(&format!(
        "{answers} cut answers, {requests} clients hung up: {tasks} tasks made, claimed and completed \
         once each, 0 orphan claims, 0 duplicate tasks, 0 duplicate outcomes; {}",
        fleet.tally.counts()
    ));
}

fn cuts(fleet: &Fleet) -> [usize; 2] {
    let sum = |side: usize| fleet.slots.iter().map(|slot| slot.calls.cuts()[side]).sum();
    [sum(0), sum(1)]
}

/// The replicas' own addresses.
async fn direct(fleet: &Fleet) -> Vec<String> {
    let mut urls = Vec::new();
    for slot in &fleet.slots {
        urls.push(slot.replica.lock().await.as_ref().expect("a replica").url.clone());
    }
    urls
}

struct Client {
    caller: Caller,
    worker: String,
    /// Past the gremlin, to hear what the server says a second time.
    direct: String,
    tasks: Arc<AtomicUsize>,
}

impl Client {
    async fn does_a_task(&mut self) {
        let key = self.caller.uuid();
        let new = json!({"title": key, "target_worker_id": self.worker});
        let created = self.sure("/v1/tasks", &new, Some(&key)).await;
        self.tasks.fetch_add(1, Ordering::Relaxed);
        let id = created["id"].as_str().expect("an id").to_owned();

        let mut claim = json!({"worker_id": self.worker, "claim_id": self.caller.uuid()});
        let claimed = if self.caller.chance(50) {
            claim["n"] = json!(1);
            self.sure("/v1/tasks/claim", &claim, None).await["tasks"][0].clone()
        } else {
            self.sure(&format!("/v1/tasks/{id}/claim"), &claim, None).await
        };
        if claimed["id"] != id.as_str() || claimed["claim_epoch"] != 1 {
            self.violation(&format!("claimed {claimed}, wanted {id}"));
        }

        let mut body = json!({"worker_id": self.worker, "claim_epoch": claimed["claim_epoch"]});
        let mut heartbeat = body.clone();
        heartbeat["progress"] = json!(0.5);
        self.sure(&format!("/v1/tasks/{id}/heartbeat"), &heartbeat, None).await;
        body["result"] = json!({"by": self.worker, "key": key});
        self.sure(&format!("/v1/tasks/{id}/complete"), &body, None).await;
    }

    /// The answer to a call, however often it has to be sent. The server must say the same again.
    async fn sure(&mut self, path: &str, body: &Value, key: Option<&str>) -> Value {
        let answer = self.caller.ask(path, body, key).await.remove(0);
        let again = loop {
            if let Some(again) = self.caller.send(&self.direct, path, body, key).await {
                break again;
            }
            self.caller.pause(10, 50).await;
        };
        let (answer, again) = (settled(&answer), settled(&again));
        if answer != again {
            self.violation(&format!("{path}: first {answer}, then {again}"));
        }
        answer
    }

    fn violation(&self, what: &str) {
        self.caller.fleet.tally.violation(format!("{}: {what}", self.worker));
    }
}

/// What two answers to one call share. A task that was created before is told with 200, not 201,
/// and a lease has less time left.
fn settled(answer: &Answer) -> Value {
    let mut body = answer.json();
    let is_good = matches!(answer.status, 200 | 201);
    let object = body.as_object_mut().expect("an object");
    object.remove("lease_expires_in");
    object.insert("is_good".to_owned(), json!(is_good));
    for task in body["tasks"].as_array_mut().into_iter().flatten() {
        task.as_object_mut().expect("a task").remove("lease_expires_in");
    }
    body
}

/// A client whose connection breaks sends its claim again at once, and the first one may still be
/// on its way to its commit. A test's trigger keeps it there for a while.
const SLOWLY: &str = "
    create function slowly() returns trigger language plpgsql as $$
    begin perform pg_sleep(0.5); return null; end $$;
    create trigger zz_slowly after update on tasks for each row
      when (new.status = 'running') execute function slowly()";
const SLEEPING: &str = "select count(*) from pg_stat_activity
     where wait_event = 'PgSleep' and datname = current_database()";

/// Sends one claim to a replica and, while it is in flight, to another one. Both answers.
async fn twice(db: &TestDb, two: [&Replica; 2], path: &str, body: &Value) -> [Answer; 2] {
    let again = async {
        eventually("the first one is in flight", async || {
            (db.value(SLEEPING).await == "1").then_some(())
        })
        .await;
        // A replica that is put off by a busy Postgres says so, and is asked again.
        eventually("the repetition is answered", async || {
            let answer = two[1].post(path, body.clone()).await;
            (answer.status != 503).then_some(answer)
        })
        .await
    };
    tokio::join!(two[0].post(path, body.clone()), again).into()
}

#[tokio::test]
async fn p4_a_claim_repeated_while_the_first_is_still_in_flight_gets_the_same_answer() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    replicas[0].register("w", &[], &[]).await;
    db.execute(SLOWLY).await;
    let claim_id = "7f0c1d1e-4e0b-4c56-8a7e-0f4d5a3b2c1d";
    for second in &replicas {
        let id = replicas[0].create(json!({"title": "x"})).await;
        let (path, body) =
            (format!("/v1/tasks/{id}/claim"), json!({"worker_id": "w", "claim_id": claim_id}));
        let [first, again] = twice(&db, [&replicas[0], second], &path, &body).await;
        assert_eq!(settled(&again), settled(&first));
        assert_eq!(first.status, 200);
    }
}

#[tokio::test]
async fn p4_a_claim_of_the_best_repeated_while_the_first_is_in_flight_claims_no_more_tasks() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    replicas[0].register("w", &[], &[]).await;
    for n in 0..8 {
        replicas[0].create(json!({"title": format!("{n}")})).await;
    }
    db.execute(SLOWLY).await;
    for (second, claim_id) in replicas.iter().zip([uuid::Uuid::new_v4(), uuid::Uuid::new_v4()]) {
        let body = json!({"worker_id": "w", "n": 1, "claim_id": claim_id});
        let [first, again] = twice(&db, [&replicas[0], second], "/v1/tasks/claim", &body).await;
        assert_eq!(settled(&again), settled(&first));
        assert_eq!(first.json()["tasks"].as_array().map(Vec::len), Some(1), "{first:?}");
    }
    assert_eq!(db.value("select count(*) from tasks where status = 'running'").await, "2");
}

#[tokio::test]
async fn p4_a_claim_that_its_client_gave_up_claims_nothing_when_its_replica_wakes_up() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    replicas[0].register("w", &[], &[]).await;
    for n in 0..4 {
        replicas[0].create(json!({"title": format!("{n}")})).await;
    }
    let body = json!({"worker_id": "w", "n": 1, "claim_id": uuid::Uuid::new_v4()});
    replicas[0].signal("STOP");
    let late = replicas[0].http("POST", "/v1/tasks/claim").json(&body);
    let given_up = late.timeout(std::time::Duration::from_millis(300)).send().await;
    assert!(given_up.is_err(), "a stopped replica does not answer");
    let claimed = replicas[1].post("/v1/tasks/claim", body).await.expect(200)["tasks"][0].clone();
    let done = json!({"claim_epoch": claimed["claim_epoch"]});
    let id = claimed["id"].as_str().unwrap();
    replicas[1].finish("complete", id, "w", done).await.expect(200);
    replicas[0].signal("CONT");
    // What it still had to do is done when it has done something later of the same kind.
    replicas[0].register("v", &[], &[]).await;
    for _ in 0..3 {
        replicas[0].post("/v1/tasks/claim", json!({"worker_id": "v"})).await.expect(200);
    }
    let held = "select count(*) from tasks where claimed_by = 'w' and status = 'running'";
    assert_eq!(db.value(held).await, "0");
}
