//! S11: workers that do not claim. What they are given, and when a slot is free again.

mod breaks;
mod crowds;
mod next;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::sse::Event;
use crate::support::{Replica, SseStream, TestDb, eventually};

/// Nothing comes for so long: nothing is on its way.
const QUIET: Duration = Duration::from_millis(800);

/// The next task that the worker is given; nothing else may come but keepalives.
async fn given(stream: &mut SseStream) -> Event {
    let event = stream.expect("task").await;
    assert_eq!(event.data["status"], "running", "{event:?}");
    event
}

async fn is_quiet(stream: &mut SseStream) {
    let event = stream.next_within(QUIET).await;
    assert!(event.is_none(), "{event:?}");
}

/// The call that ends the claim that an event brought.
async fn finish(replica: &Replica, verb: &str, event: &Event, more: Value) {
    let mut body = more;
    body["claim_epoch"] = event.data["claim_epoch"].clone();
    let worker = event.data["claimed_by"].as_str().unwrap();
    replica.finish(verb, event.task(), worker, body).await.expect(200);
}

async fn complete(replica: &Replica, event: &Event) {
    finish(replica, "complete", event, json!({})).await;
}

async fn running(db: &TestDb, worker: &str) -> usize {
    let sql =
        format!("select count(*) from tasks where status = 'running' and claimed_by = '{worker}'");
    db.value(&sql).await.parse().unwrap()
}

#[tokio::test]
async fn a_worker_with_slots_is_given_tasks_without_claiming() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = SseStream::open(&replica.url, "worker_id=w&slots=2", &[]).await;
    assert_eq!(stream.next().await.data["slots"], 2);
    let id = replica
        .create(json!({"title": "x", "prompt": "do it", "metadata": {"a": 1}, "priority": 3}))
        .await;
    let event = given(&mut stream).await;
    let data = &event.data;
    assert_eq!((event.task(), &data["prompt"]), (id.as_str(), &json!("do it")));
    assert_eq!((&data["metadata"], &data["priority"]), (&json!({"a": 1}), &json!(3)));
    assert_eq!((&data["claimed_by"], &data["claim_epoch"]), (&json!("w"), &json!(1)));
    assert_eq!((&data["lease_expires_in"], &data["attempt"]), (&json!(60), &json!(1)));
    assert!(data.get("redelivered").is_none() && data.get("partial").is_none(), "{data}");
    let beat = json!({"worker_id": "w", "claim_epoch": 1, "progress": 0.5});
    replica.post(&format!("/v1/tasks/{id}/heartbeat"), beat).await.expect(200);
    complete(&replica, &event).await;
    assert_eq!(replica.task(&id).await["status"], "completed");
    let metrics = replica.get("/metrics").await.text;
    assert!(metrics.contains("claims_total{outcome=\"assigned\"} 1"), "{metrics}");
}

#[tokio::test]
async fn never_more_than_n_at_a_time_however_a_slot_becomes_free() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = SseStream::open(&replica.url, "worker_id=w", &[("X-Worker-Slots", "3")]).await;
    assert_eq!(stream.next().await.data["slots"], 3);
    for n in 0..4 {
        replica.create(json!({"title": format!("live {n}")})).await;
    }
    db.execute("insert into tasks (title) select 'x' from generate_series(1, 10)").await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(given(&mut stream).await);
    }
    is_quiet(&mut stream).await;
    for (verb, more) in [
        ("complete", json!({})),
        ("fail", json!({"error": "no", "retry": false})),
        ("fail", json!({"error": "no"})),
        ("release", json!({})),
    ] {
        finish(&replica, verb, &held.remove(0), more).await;
        held.push(given(&mut stream).await);
        assert_eq!(running(&db, "w").await, 3);
    }
    is_quiet(&mut stream).await;
    // What it claims by itself counts, too: there are three and one now, and two must end.
    let own = db.value("select id from tasks where status = 'pending' and due limit 1").await;
    let own = replica.claim(&own, "w").await.expect(200);
    complete(&replica, &held.remove(0)).await;
    is_quiet(&mut stream).await;
    replica.finish("complete", own["id"].as_str().unwrap(), "w", json!({})).await.expect(200);
    given(&mut stream).await;
    assert_eq!(running(&db, "w").await, 3);
}

#[tokio::test]
async fn best_tasks_first() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    for (title, priority) in [("c", 1), ("a", 9), ("d", 0), ("b", 5)] {
        replica.create(json!({"title": title, "priority": priority})).await;
    }
    let mut stream = replica.stream("worker_id=w&slots=1").await;
    for title in ["a", "b", "urgent", "c", "d"] {
        let event = given(&mut stream).await;
        assert_eq!(event.data["title"], title);
        if title == "b" {
            replica.create(json!({"title": "urgent", "priority": 7})).await;
        }
        complete(&replica, &event).await;
    }
    is_quiet(&mut stream).await;
}

#[tokio::test]
async fn only_what_is_for_the_worker_is_given_to_it() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let query = "worker_id=w&slots=9&codebases=mine&capabilities=build&agent_name=me";
    let mut stream = replica.stream(query).await;
    for (title, more) in [
        ("codebase", json!({"codebase_id": "other"})),
        ("capability", json!({"required_capabilities": ["fly"]})),
        ("worker", json!({"target_worker_id": "v"})),
        ("name", json!({"target_agent_name": "you"})),
        ("mine", json!({"codebase_id": "mine", "required_capabilities": ["build"]})),
        ("to me", json!({"target_worker_id": "w", "target_agent_name": "me"})),
    ] {
        let mut body = more;
        body["title"] = json!(title);
        replica.create(body).await;
    }
    let titles =
        [given(&mut stream).await, given(&mut stream).await].map(|e| e.data["title"].clone());
    assert!(titles.contains(&json!("mine")) && titles.contains(&json!("to me")), "{titles:?}");
    is_quiet(&mut stream).await;
}

#[tokio::test]
async fn a_large_task_is_partial() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&slots=4").await;
    let prompt = "x".repeat(17_000);
    for metadata in [json!({}), json!({"note": "y".repeat(20_000)})] {
        let body = json!({"title": "large", "prompt": prompt, "metadata": metadata});
        let id = replica.create(body).await;
        let event = given(&mut stream).await;
        assert_eq!((event.task(), &event.data["partial"]), (id.as_str(), &json!(true)));
        assert!(event.data.get("prompt").is_none() && event.data.get("metadata").is_none());
        assert_eq!(
            (&event.data["claim_epoch"], &event.data["title"]),
            (&json!(1), &json!("large"))
        );
        assert_eq!(replica.task(&id).await["prompt"], prompt);
        complete(&replica, &event).await;
    }
}

#[tokio::test]
async fn bad_slots_are_refused() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    for query in [
        "slots=0",
        "slots=1001",
        "slots=-1",
        "slots=x",
        "slots=",
        "slots=1.5",
        "slots=1&slots=2",
        "slots=1&events=task_available",
    ] {
        let answer = replica.get(&format!("/v1/worker/tasks/stream?worker_id=w&{query}")).await;
        assert_eq!(
            (answer.status, answer.problem().as_str()),
            (400, "invalid_parameter"),
            "{query}"
        );
    }
    let both = replica.http("GET", "/v1/worker/tasks/stream?worker_id=w&slots=1");
    let answer = replica.request(both.header("X-Worker-Slots", "2")).await;
    assert_eq!((answer.status, answer.problem().as_str()), (400, "invalid_parameter"));
    assert_eq!(db.value("select count(*) from streams").await, "0");
    replica.stream("worker_id=w&slots=1000").await;
}

#[tokio::test]
async fn finishing_on_another_replica_frees_the_slot() {
    let db = TestDb::new().await;
    let (own, other) = (Replica::start(&db).await, Replica::start(&db).await);
    let mut stream = own.stream("worker_id=w&slots=2").await;
    db.execute("insert into tasks (title) select 'x' from generate_series(1, 12)").await;
    let mut held = vec![given(&mut stream).await, given(&mut stream).await];
    let begun = Instant::now();
    let verbs =
        [("complete", json!({})), ("fail", json!({"retry": false})), ("complete", json!({}))];
    for (verb, more) in verbs.into_iter().cycle().take(9) {
        let ended = Instant::now();
        finish(&other, verb, &held.remove(0), more).await;
        held.push(given(&mut stream).await);
        assert!(ended.elapsed() < Duration::from_secs(1), "{:?}", ended.elapsed());
        assert_eq!(running(&db, "w").await, 2);
    }
    // The looks that find what no hint told come every 1.5 s.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn what_is_ended_for_the_worker_frees_the_slot() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&slots=1").await;
    let ended = [
        "update tasks set status = 'completed' where status = 'running'",
        "update tasks set status = 'cancelled' where status = 'running'",
        "select requeue_task(id) from tasks where status = 'running'",
        "delete from tasks where status = 'running'",
        "update tasks set timeout_seconds = 1 where status = 'running'",
    ];
    for sql in ended {
        let id = replica.create(json!({"title": "x", "max_attempts": 1})).await;
        let first = given(&mut stream).await;
        assert_eq!(first.task(), id, "{sql}");
        let next = replica.create(json!({"title": "next", "priority": 1})).await;
        db.execute(sql).await;
        let event = loop {
            let event = stream.next().await;
            if event.name == "task" {
                break event;
            }
            assert!(["task_cancelled", "keepalive"].contains(&event.name.as_str()), "{event:?}");
        };
        assert_eq!(event.task(), next, "{sql}");
        db.execute("delete from tasks where status = 'pending'").await;
        complete(&replica, &event).await;
    }
}

#[tokio::test]
async fn a_cancellation_reaches_the_worker() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&slots=1").await;
    let id = replica.create(json!({"title": "x"})).await;
    let event = given(&mut stream).await;
    replica.post(&format!("/v1/tasks/{id}/cancel"), json!({"reason": "no need"})).await.expect(200);
    let told = stream.expect("task_cancelled").await;
    assert_eq!((told.task(), &told.data["reason"]), (id.as_str(), &json!("no need")));
    finish(&replica, "release", &event, json!({})).await;
    assert_eq!(replica.task(&id).await["status"], "cancelled");
    replica.create(json!({"title": "y"})).await;
    assert_eq!(given(&mut stream).await.data["title"], "y");
}

#[tokio::test]
async fn a_task_that_was_locked_is_given_once_it_no_longer_is() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let id = replica.create(json!({"title": "y"})).await;
    let mut operator = db.pool.begin().await.unwrap();
    sqlx::query("select 1 from tasks where id = $1::uuid for update")
        .bind(&id)
        .execute(&mut *operator)
        .await
        .unwrap();
    let mut stream = replica.stream("worker_id=w&slots=1").await;
    is_quiet(&mut stream).await;
    operator.rollback().await.unwrap();
    assert_eq!(given(&mut stream).await.task(), id);
}

#[tokio::test]
async fn a_worker_that_does_not_act_is_not_swamped_and_goes_on_where_it_was() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    db.execute("insert into tasks (title, prompt) select 'x', repeat('p', 3000) from generate_series(1, 60)")
        .await;
    let mut stream = replica.stream("worker_id=w&slots=1000").await;
    let (mut held, mut bytes) = (Vec::new(), 0);
    while let Some(event) = stream.next_within(QUIET).await {
        bytes += event.data.to_string().len();
        held.push(event);
    }
    assert!((5..=14).contains(&held.len()) && bytes <= 40 * 1024, "{} of {bytes}", held.len());
    // Every sign that it has read lets more through.
    let last = held.last().unwrap();
    let beat = json!({"worker_id": "w", "claim_epoch": 1});
    replica.post(&format!("/v1/tasks/{}/heartbeat", last.task()), beat).await.expect(200);
    held.push(given(&mut stream).await);
    let mut done = 0;
    while done < 60 {
        let event = if held.is_empty() { given(&mut stream).await } else { held.remove(0) };
        complete(&replica, &event).await;
        done += 1;
    }
    eventually("all are done", || async {
        (db.value("select count(*) from tasks where status = 'completed'").await == "60")
            .then_some(())
    })
    .await;
}
