//! C4 and C6: a claim lives by its owner's stream or by heartbeats, and ends with its lease or timeout.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Answer, Replica, TestDb, eventually};

async fn heartbeat(replica: &Replica, id: &str, worker: &str, more: Value) -> Answer {
    replica.finish("heartbeat", id, worker, more).await
}

async fn status_of(replica: &Replica, id: &str, status: &str) -> Value {
    eventually(&format!("the task is {status}"), async || {
        let task = replica.task(id).await;
        (task["status"] == status).then_some(task)
    })
    .await
}

async fn attempts(replica: &Replica, id: &str) -> Vec<Value> {
    let answer = replica.get(&format!("/v1/tasks/{id}/attempts")).await.expect(200);
    answer["attempts"].as_array().unwrap().clone()
}

#[tokio::test]
async fn c4_heartbeats_keep_a_claim_alive_and_without_them_it_is_back_within_lease_and_2_s() {
    let db = TestDb::new().await;
    let replicas = [
        Replica::start_with(&db, &["--lease-seconds", "2"]).await,
        Replica::start_with(&db, &["--lease-seconds", "2"]).await,
    ];
    replicas[0].register("w", &[], &[]).await;
    let id = replicas[0].create(json!({"title": "x"})).await;
    replicas[0].claim(&id, "w").await.expect(200);
    // Twice the lease and more, over both replicas: each heartbeat is in time, or the next one fails.
    for n in 0..6 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let beat = heartbeat(&replicas[n % 2], &id, "w", json!({"claim_epoch": 1})).await;
        let beat = beat.expect(200);
        let left = beat["lease_expires_in"].as_f64().unwrap();
        assert!((1.9..=2.0).contains(&left), "{beat}");
        assert_eq!(beat["cancel_requested"], false);
    }
    let task = status_of(&replicas[1], &id, "pending").await;
    assert_eq!((&task["attempt"], &task["claimed_by"]), (&json!(1), &json!(null)));
    let late = db
        .value(
            "select extract(epoch from a.ended_at - h.lease_expires_at) from attempts a
               join heartbeats h using (task_id, claim_epoch)",
        )
        .await;
    let late: f64 = late.parse().unwrap();
    assert!((0.0..=2.0).contains(&late), "given back {late} s after its lease");
    let [attempt] = &attempts(&replicas[0], &id).await[..] else { panic!("one attempt") };
    assert_eq!((&attempt["outcome"], &attempt["worker_id"]), (&json!("lapsed"), &json!("w")));
    assert_eq!(attempt["error"], "attempt 1: the lease of worker w expired");
}

#[tokio::test]
async fn a_call_that_is_no_heartbeat_of_the_task_keeps_no_claim_alive() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--lease-seconds", "1"]).await;
    replica.register("w", &[], &[]).await;
    let forgotten = replica.create(json!({"title": "forgotten in a crash"})).await;
    replica.claim(&forgotten, "w").await.expect(200);
    eventually("the claim lapses although its worker calls all the time", async || {
        replica.post("/v1/agent/workers/w/heartbeat", json!({})).await.expect(200);
        replica.claim(&forgotten, "w").await;
        (replica.task(&forgotten).await["claim_epoch"] == 2).then_some(())
    })
    .await;
}

#[tokio::test]
async fn c3_a_heartbeat_of_a_past_claim_is_refused_with_what_happened_and_changes_nothing() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    for worker in ["w", "v"] {
        replica.register(worker, &[], &[]).await;
    }
    let id = replica.create(json!({"title": "x"})).await;
    let missing = heartbeat(&replica, "00000000-0000-0000-0000-000000000000", "w", json!({})).await;
    assert_eq!(missing.problem(), "task_not_found");
    replica.claim(&id, "w").await.expect(200);
    heartbeat(&replica, &id, "w", json!({"progress": 0.5, "message": "half way"}))
        .await
        .expect(200);
    replica.finish("release", &id, "w", json!({"claim_epoch": 1})).await.expect(200);
    // Also when the same worker has claimed it again.
    replica.claim(&id, "w").await.expect(200);
    let before = db.value("select t::text || h::text from tasks t join heartbeats h on true").await;
    for (worker, more, outcome) in [
        ("w", json!({"claim_epoch": 1, "progress": 0.9}), json!("released")),
        ("w", json!({"claim_epoch": 3, "checkpoint": 1}), json!(null)),
        ("v", json!({"message": "mine"}), json!(null)),
    ] {
        let refused = heartbeat(&replica, &id, worker, more).await;
        assert_eq!((refused.status, refused.problem().as_str()), (409, "claim_lost"));
        let problem = refused.json();
        assert_eq!((&problem["outcome"], &problem["claimed_by"]), (&outcome, &json!("w")));
        assert_eq!(
            (&problem["claim_epoch"], &problem["task_status"]),
            (&json!(2), &json!("running"))
        );
    }
    let after = db.value("select t::text || h::text from tasks t join heartbeats h on true").await;
    assert_eq!(before, after);
    assert_eq!(attempts(&replica, &id).await[1]["late_calls"], 1);
}

#[tokio::test]
async fn a_row_that_somebody_has_locked_holds_up_no_other_heartbeat() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        let id = replica.create(json!({"title": "x"})).await;
        replica.claim(&id, "w").await.expect(200);
        ids.push(id);
    }
    let mut operator = db.pool.begin().await.unwrap();
    let lock = format!("select 1 from tasks where id = '{}' for update", ids[0]);
    sqlx::raw_sql(sqlx::AssertSqlSafe(lock)).execute(&mut *operator).await.unwrap();
    let begun = std::time::Instant::now();
    let beats = ids.iter().map(|id| heartbeat(&replica, id, "w", json!({"claim_epoch": 1})));
    let answers = futures_util::future::join_all(beats).await;
    assert!(begun.elapsed() < Duration::from_millis(1_500), "{:?}", begun.elapsed());
    assert_eq!((answers[0].status, answers[0].problem().as_str()), (503, "contended"));
    assert!(answers[1..].iter().all(|answer| answer.status == 200), "{answers:?}");
    operator.rollback().await.unwrap();
    heartbeat(&replica, &ids[0], "w", json!({"claim_epoch": 1})).await.expect(200);
}

#[tokio::test]
async fn progress_and_message_are_those_of_the_claim_and_a_checkpoint_is_handed_on() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let mut stream = replicas[1].stream("worker_id=w").await;
    let id = replicas[0].create(json!({"title": "x"})).await;
    stream.announced().await;
    replicas[0].claim(&id, "w").await.expect(200);
    let said = json!({"progress": 0.25, "message": "a quarter", "checkpoint": {"line": 100}});
    heartbeat(&replicas[0], &id, "w", said).await.expect(200);
    // What is left out stays.
    heartbeat(&replicas[1], &id, "w", json!({"progress": 0.5})).await.expect(200);
    let task = replicas[1].task(&id).await;
    assert_eq!(
        (&task["progress"], &task["message"], &task["checkpoint"]),
        (&json!(0.5), &json!("a quarter"), &json!({"line": 100}))
    );
    replicas[0].finish("fail", &id, "w", json!({"retry_after_seconds": 0})).await.expect(200);
    stream.announced().await;
    let pushed = stream.next().await;
    assert_eq!((pushed.name.as_str(), &pushed.data["checkpoint"]), ("task", &json!({"line": 100})));
    assert_eq!(pushed.data, replicas[0].task(&id).await, "as GET has it");
    let claimed = replicas[1].claim(&id, "w").await.expect(200);
    assert_eq!(
        (&claimed["progress"], &claimed["message"], &claimed["checkpoint"]),
        (&json!(null), &json!(null), &json!({"line": 100}))
    );
    // A heartbeat of the new claim begins anew, but for the checkpoint.
    heartbeat(&replicas[1], &id, "w", json!({"progress": 0.1})).await.expect(200);
    let task = replicas[1].task(&id).await;
    assert_eq!((&task["message"], &task["checkpoint"]), (&json!(null), &json!({"line": 100})));
}

#[tokio::test]
async fn a_heartbeats_fields_have_limits() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let id = replica.create(json!({"title": "x"})).await;
    replica.claim(&id, "w").await.expect(200);
    for (field, bad) in [
        ("progress", json!(1.01)),
        ("progress", json!(-0.1)),
        ("message", json!("x".repeat(4097))),
        ("checkpoint", json!("x".repeat(256 * 1024))),
    ] {
        let refused = heartbeat(&replica, &id, "w", json!({ field: bad })).await;
        assert_eq!((refused.status, refused.problem().as_str()), (422, "invalid_field"));
        assert_eq!(refused.json()["field"], field);
    }
    let most = json!({"progress": 1, "message": "x".repeat(4096), "checkpoint": "x".repeat(256 * 1024 - 2)});
    heartbeat(&replica, &id, "w", most).await.expect(200);
    // Too large for a pushed event: it says so, and the claim's answer is whole.
    let mut stream = replica.stream("worker_id=v").await;
    replica.finish("release", &id, "w", json!({})).await.expect(200);
    stream.announced().await;
    let pushed = stream.next().await;
    assert_eq!((&pushed.data["partial"], pushed.data.get("checkpoint")), (&json!(true), None));
    let claimed = replica.claim(&id, "v").await.expect(200);
    assert_eq!(claimed["checkpoint"].as_str().unwrap().len(), 256 * 1024 - 2);
}

#[tokio::test]
async fn c4_a_timeout_ends_an_attempt_whatever_stream_and_heartbeats_say() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    let id = replica.create(json!({"title": "x", "timeout_seconds": 1, "max_attempts": 2})).await;
    for (attempt, ends_as) in [(1, "pending"), (2, "failed")] {
        assert_eq!(stream.announced().await, id);
        let claimed = replica.claim(&id, "w").await.expect(200);
        assert_eq!(claimed["lease_expires_in"], 1, "no longer than the timeout");
        let beat = heartbeat(&replica, &id, "w", json!({})).await.expect(200);
        assert!(beat["lease_expires_in"].as_f64().unwrap() <= 1.0, "{beat}");
        let told = stream.expect("task_cancelled").await;
        assert_eq!((told.task(), &told.data["claim_epoch"]), (id.as_str(), &json!(attempt)));
        let task = status_of(&replica, &id, ends_as).await;
        assert_eq!(task["attempt"], attempt);
        assert!(
            task["error"].as_str().unwrap().ends_with("worker w took longer than 1 s"),
            "{task}"
        );
        let refused = replica.finish("complete", &id, "w", json!({"claim_epoch": attempt})).await;
        assert_eq!((refused.status, refused.json()["outcome"].clone()), (409, json!("timed_out")));
    }
    for attempt in attempts(&replica, &id).await {
        assert_eq!((&attempt["outcome"], &attempt["late_calls"]), (&json!("timed_out"), &json!(1)));
    }
    let longest = "select max(extract(epoch from ended_at - started_at)) from attempts";
    let longest: f64 = db.value(longest).await.parse().unwrap();
    assert!((1.0..3.0).contains(&longest), "ended after {longest} s");
    // It was tried again after a pause, as after a failure.
    let pause = "select extract(epoch from max(started_at) - min(ended_at)) from attempts";
    let pause: f64 = db.value(pause).await.parse().unwrap();
    assert!(pause >= 1.4, "{pause}");
}

#[tokio::test]
async fn a_cancelled_task_whose_worker_does_not_obey_ends_with_its_lease() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--lease-seconds", "1"]).await;
    replica.register("w", &[], &[]).await;
    let id = replica.create(json!({"title": "x"})).await;
    replica.claim(&id, "w").await.expect(200);
    let cancel = format!("/v1/tasks/{id}/cancel");
    replica.post(&cancel, json!({"reason": "no more"})).await.expect(200);
    let beat = heartbeat(&replica, &id, "w", json!({})).await.expect(200);
    assert_eq!(beat["cancel_requested"], true);
    let task = status_of(&replica, &id, "cancelled").await;
    assert_eq!((&task["cancel_reason"], &task["claimed_by"]), (&json!("no more"), &json!("w")));
    assert_eq!(attempts(&replica, &id).await[0]["outcome"], "cancelled");
}

#[tokio::test]
async fn every_attempt_leaves_a_row_that_says_who_when_and_how_it_ended() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    for worker in ["a", "b"] {
        replica.register(worker, &[], &[]).await;
    }
    let id = replica.create(json!({"title": "x"})).await;
    assert_eq!(attempts(&replica, &id).await, Vec::<Value>::new());
    let boom = json!({"error": "boom", "retry_after_seconds": 0});
    for (worker, verb, body) in
        [("a", "fail", boom), ("b", "release", json!({})), ("b", "complete", json!({"result": 1}))]
    {
        replica.claim(&id, worker).await.expect(200);
        let running = &attempts(&replica, &id).await[0];
        assert_eq!((&running["worker_id"], &running["outcome"]), (&json!(worker), &json!(null)));
        assert!(running["started_at"].is_string() && running["ended_at"].is_null());
        replica.finish(verb, &id, worker, body).await.expect(200);
    }
    let listed = attempts(&replica, &id).await;
    let told: Vec<_> = listed
        .iter()
        .map(|a| [&a["claim_epoch"], &a["attempt"], &a["worker_id"], &a["outcome"], &a["error"]])
        .collect();
    assert_eq!(
        json!(told),
        json!([
            [3, 2, "b", "completed", null],
            [2, 2, "b", "released", null],
            [1, 1, "a", "failed", "boom"]
        ])
    );
    assert!(listed.iter().all(|a| a["started_at"].is_string() && a["ended_at"].is_string()));
    let missing = replica.get("/v1/tasks/00000000-0000-0000-0000-000000000000/attempts").await;
    assert_eq!(missing.problem(), "task_not_found");
}

#[tokio::test]
async fn a_complete_is_repeatable_for_as_long_as_its_attempt_is_known() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    replicas[0].register("w", &[], &[]).await;
    let id = replicas[0].create(json!({"title": "x"})).await;
    replicas[0].claim(&id, "w").await.expect(200);
    let done = json!({"claim_epoch": 1, "result": 1});
    let first = replicas[0].finish("complete", &id, "w", done.clone()).await.expect(200);
    assert_eq!(replicas[1].finish("complete", &id, "w", done.clone()).await.expect(200), first);
    // An operator has it done again; the answer to the first one is still the same.
    db.execute(&format!("select requeue_task('{id}')")).await;
    assert_eq!(replicas[1].finish("complete", &id, "w", done).await.expect(200), first);
    assert_eq!(replicas[0].task(&id).await["status"], "pending");
}

#[tokio::test]
async fn p21_a_database_clock_that_steps_moves_expiry_and_nothing_else() {
    // To Taskwire, which sends durations and lets Postgres compare, a clock that steps by an hour is
    // the same as rows that move by an hour the other way.
    let db = TestDb::new().await;
    let lease = ["--lease-seconds", "3"];
    let replicas = [Replica::start_with(&db, &lease).await, Replica::start_with(&db, &lease).await];
    let step = async |interval: &str| {
        db.execute(&format!(
            "begin;
             update replicas set last_seen_at = last_seen_at - interval '{interval}', steady_since = steady_since - interval '{interval}';
             update workers set last_seen_at = last_seen_at - interval '{interval}', stream_ended_at = stream_ended_at - interval '{interval}';
             update streams set connected_at = connected_at - interval '{interval}';
             update heartbeats set lease_expires_at = lease_expires_at - interval '{interval}';
             update tasks set run_at = run_at - interval '{interval}', claimed_at = claimed_at - interval '{interval}',
                              lease_expires_at = lease_expires_at - interval '{interval}';
             commit",
        ))
        .await;
    };
    let _stream = replicas[0].stream("worker_id=streams").await;
    replicas[1].register("beats", &[], &[]).await;
    let mut held = Vec::new();
    for worker in ["streams", "beats"] {
        let id = replicas[0].create(json!({"title": worker})).await;
        replicas[1].claim(&id, worker).await.expect(200);
        held.push(id);
    }
    for forward in ["1 hour", "-1 hour", "1 day"] {
        step(forward).await;
        // Everyone has a lease's time to show a sign of life; nobody loses a claim who does.
        for n in 0..4 {
            tokio::time::sleep(Duration::from_millis(700)).await;
            heartbeat(&replicas[n % 2], &held[1], "beats", json!({"claim_epoch": 1}))
                .await
                .expect(200);
            assert_eq!(replicas[0].task(&held[0]).await["claim_epoch"], 1);
        }
    }
    for (id, worker) in held.iter().zip(["streams", "beats"]) {
        replicas[0].finish("complete", id, worker, json!({"claim_epoch": 1})).await.expect(200);
    }
    assert_eq!(db.value("select count(*) from attempts where outcome = 'completed'").await, "2");
    assert_eq!(db.value("select count(*) from attempts").await, "2");
}
