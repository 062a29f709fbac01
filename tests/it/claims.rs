//! Claims: one winner, fenced ends, and what the losers are told.

use serde_json::json;

use crate::support::{Replica, TestDb, eventually};

#[tokio::test]
async fn a_claim_gives_the_whole_task_its_epoch_and_its_lease() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let id = replica.create(json!({"title": "x", "prompt": "do it"})).await;
    let claimed = replica.claim(&id, "w").await.expect(200);
    assert_eq!(claimed["status"], "running");
    assert_eq!(claimed["prompt"], "do it");
    assert_eq!((&claimed["claim_epoch"], &claimed["attempt"]), (&json!(1), &json!(1)));
    assert_eq!((&claimed["claimed_by"], &claimed["lease_expires_in"]), (&json!("w"), &json!(60)));
}

#[tokio::test]
async fn a_worker_may_name_itself_in_body_query_or_header_when_it_claims() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let path = async || format!("/v1/tasks/{}/claim", replica.create(json!({"title": "x"})).await);
    let (a, b, c, d) = (path().await, path().await, path().await, path().await);
    replica.post(&a, json!({"worker_id": "w"})).await.expect(200);
    replica.request(replica.http("POST", &format!("{b}?worker_id=w"))).await.expect(200);
    replica.request(replica.http("POST", &c).header("X-Worker-ID", "w")).await.expect(200);
    replica.request(replica.http("POST", &d).header("worker_id", "w")).await.expect(200);
    let nobody = replica.request(replica.http("POST", &path().await)).await;
    assert_eq!((nobody.status, nobody.problem().as_str()), (400, "worker_id_missing"));
    let two = replica.http("POST", &format!("{a}?worker_id=w")).json(&json!({"worker_id": "v"}));
    let two = replica.request(two).await;
    assert_eq!((two.status, two.problem().as_str()), (400, "worker_id_conflict"));
}

#[tokio::test]
async fn a_refused_claim_says_why() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    for worker in ["w", "v"] {
        replica.register(worker, &["known"], &["build"]).await;
    }
    let refused = async |body, worker: &str| {
        let id = replica.create(body).await;
        let answer = replica.claim(&id, worker).await;
        (answer.status, answer.problem())
    };
    let of = |status: u16, code: &str| (status, code.to_owned());
    assert_eq!(refused(json!({"title": "x"}), "stranger").await, of(403, "unknown_worker"));
    let not_routed = of(403, "not_routed");
    for body in [
        json!({"title": "x", "codebase_id": "unknown"}),
        json!({"title": "x", "required_capabilities": ["build", "deploy"]}),
        json!({"title": "x", "target_worker_id": "v"}),
        json!({"title": "x", "target_agent_name": "somebody"}),
    ] {
        assert_eq!(refused(body, "w").await, not_routed);
    }
    let later = json!({"title": "x", "run_at": "2099-01-01T00:00:00Z"});
    assert_eq!(refused(later, "w").await, of(409, "task_not_due"));
    let past = json!({"title": "x", "run_at": "2020-01-01T00:00:00Z", "expires_at": "2020-01-02T00:00:00Z"});
    assert_eq!(refused(past, "w").await, of(409, "task_expired"));

    let id = replica.create(json!({"title": "x", "codebase_id": "known"})).await;
    replica.claim(&id, "w").await.expect(200);
    for worker in ["v", "w"] {
        let answer = replica.claim(&id, worker).await;
        assert_eq!((answer.status, answer.problem().as_str()), (409, "already_claimed"));
        assert_eq!(answer.json()["claimed_by"], "w");
    }
    replica.finish("complete", &id, "w", json!({})).await.expect(200);
    let answer = replica.claim(&id, "v").await;
    assert_eq!((answer.status, answer.problem().as_str()), (409, "task_ended"));
    for missing in ["00000000-0000-0000-0000-000000000000", "task-abc"] {
        let answer = replica.claim(missing, "w").await;
        assert_eq!((answer.status, answer.problem().as_str()), (404, "task_not_found"));
    }
}

#[tokio::test]
async fn c2_a_claim_repeated_with_its_claim_id_gets_the_same_answer() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    for worker in ["w", "v"] {
        replicas[0].register(worker, &[], &[]).await;
    }
    let id = replicas[0].create(json!({"title": "x"})).await;
    let path = format!("/v1/tasks/{id}/claim");
    let claim_id = "7f0c1d1e-4e0b-4c56-8a7e-0f4d5a3b2c1d";
    let body = json!({"worker_id": "w", "claim_id": claim_id});
    let first = replicas[0].post(&path, body.clone()).await.expect(200);
    for replica in &replicas {
        assert_eq!(replica.post(&path, body.clone()).await.expect(200), first);
    }
    let stolen = json!({"worker_id": "v", "claim_id": claim_id});
    assert_eq!(replicas[0].post(&path, stolen).await.status, 409);
    // One that was long on its way comes after the claim's end: it must not claim for nobody.
    replicas[0].finish("release", &id, "w", json!({})).await.expect(200);
    let late = replicas[1].post(&path, body).await;
    assert_eq!((late.status, late.problem().as_str()), (409, "claim_lost"));
    assert_eq!(late.json()["outcome"], "released");
    replicas[1].claim(&id, "w").await.expect(200);
}

#[tokio::test]
async fn c3_a_worker_that_lost_its_claim_cannot_end_the_task() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    for worker in ["slow", "fast"] {
        replica.register(worker, &[], &[]).await;
    }
    let id = replica.create(json!({"title": "x"})).await;
    replica.claim(&id, "slow").await.expect(200);
    replica.finish("release", &id, "slow", json!({})).await.expect(200);
    replica.claim(&id, "fast").await.expect(200);
    for verb in ["complete", "fail", "release"] {
        for more in [json!({"claim_epoch": 1}), json!({})] {
            let answer = replica.finish(verb, &id, "slow", more).await;
            assert_eq!((answer.status, answer.problem().as_str()), (409, "claim_lost"));
        }
        // Nor can the owner by an older claim of its own.
        let answer = replica.finish(verb, &id, "fast", json!({"claim_epoch": 1})).await;
        assert_eq!((answer.status, answer.problem().as_str()), (409, "claim_lost"));
    }
    let task = replica.task(&id).await;
    assert_eq!((&task["status"], &task["claimed_by"]), (&json!("running"), &json!("fast")));

    let done = json!({"claim_epoch": 2, "result": {"answer": 42}});
    replica.finish("complete", &id, "fast", done.clone()).await.expect(200);
    // Its answer may have been lost: the same again is no error and changes nothing.
    let again = json!({"claim_epoch": 2, "result": "another"});
    replica.finish("complete", &id, "fast", again).await.expect(200);
    let task = replica.task(&id).await;
    assert_eq!((&task["status"], &task["result"]), (&json!("completed"), &done["result"]));
    for verb in ["fail", "release"] {
        assert_eq!(replica.finish(verb, &id, "fast", json!({})).await.problem(), "claim_lost");
    }
}

#[tokio::test]
async fn the_epoch_grows_with_each_claim_and_a_release_costs_no_attempt() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let mut stream = replica.stream("worker_id=w").await;
    let id = replica.create(json!({"title": "x", "max_attempts": 1})).await;
    for epoch in 1..=3 {
        // Each time it comes back it is announced anew.
        assert_eq!(stream.announced().await, id);
        let claimed = replica.claim(&id, "w").await.expect(200);
        assert_eq!((&claimed["claim_epoch"], &claimed["attempt"]), (&json!(epoch), &json!(1)));
        let released = replica.finish("release", &id, "w", json!({})).await.expect(200);
        assert_eq!((&released["status"], &released["attempt"]), (&json!("pending"), &json!(0)));
    }
}

#[tokio::test]
async fn c5_a_failure_is_retried_after_a_pause_until_the_attempts_are_used_up() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w").await;
    let id = replica.create(json!({"title": "x", "max_attempts": 2})).await;
    assert_eq!(stream.announced().await, id);
    replica.claim(&id, "w").await.expect(200);
    let failed = replica.finish("fail", &id, "w", json!({"error": "boom"})).await.expect(200);
    assert_eq!(failed["status"], "pending");
    let run_in = failed["run_in"].as_f64().unwrap();
    assert!((1.4..=2.5).contains(&run_in), "1 s * 2^1, give or take a quarter: {run_in}");
    assert_eq!(replica.claim(&id, "w").await.problem(), "task_not_due");
    assert_eq!(stream.announced().await, id, "announced again when it is due");
    replica.claim(&id, "w").await.expect(200);
    let failed = replica.finish("fail", &id, "w", json!({"error": "bang"})).await.expect(200);
    assert_eq!(failed["status"], "failed");
    assert_eq!(replica.task(&id).await["error"], "bang");
}

#[tokio::test]
async fn a_worker_may_say_when_to_retry_or_that_a_failure_is_final() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let id = replica.create(json!({"title": "x"})).await;
    replica.claim(&id, "w").await.expect(200);
    let body = json!({"retry_after_seconds": 0});
    assert_eq!(replica.finish("fail", &id, "w", body).await.expect(200)["run_in"], 0.0);
    replica.claim(&id, "w").await.expect(200);
    let body = json!({"error": "hopeless", "retry": false});
    assert_eq!(replica.finish("fail", &id, "w", body).await.expect(200)["status"], "failed");
}

#[tokio::test]
async fn a_pending_task_is_cancelled_at_once_and_a_running_one_by_its_owner() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let mut stream = replicas[1].stream("worker_id=w").await;
    let cancel = async |id: &str| {
        replicas[0]
            .post(&format!("/v1/tasks/{id}/cancel"), json!({"reason": "changed my mind"}))
            .await
    };

    let pending =
        replicas[0].create(json!({"title": "later", "run_at": "2099-01-01T00:00:00Z"})).await;
    for _ in 0..2 {
        assert_eq!(cancel(&pending).await.expect(200)["status"], "cancelled");
    }

    let running = replicas[0].create(json!({"title": "now"})).await;
    assert_eq!(stream.announced().await, running);
    replicas[0].claim(&running, "w").await.expect(200);
    let answer = cancel(&running).await.expect(200);
    assert_eq!((&answer["status"], &answer["cancel_requested"]), (&json!("running"), &json!(true)));
    let told = stream.expect("task_cancelled").await;
    assert_eq!((told.task(), &told.data["reason"]), (running.as_str(), &json!("changed my mind")));
    // The worker obeys, by whatever verb but complete.
    let ended = replicas[0].finish("release", &running, "w", json!({})).await.expect(200);
    assert_eq!(ended["status"], "cancelled");

    let done = replicas[0].create(json!({"title": "done"})).await;
    replicas[0].claim(&done, "w").await.expect(200);
    replicas[0].finish("complete", &done, "w", json!({})).await.expect(200);
    assert_eq!(cancel(&done).await.problem(), "task_ended");
}

#[tokio::test]
async fn the_older_servers_calls_claim_and_end_tasks_too() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let call = async |path: &str, body| {
        let request = replica.http("POST", path).header("X-Worker-ID", "w").json(&body);
        replica.request(request).await
    };
    for (status, stored) in
        [("completed", "completed"), ("failed", "failed"), ("cancelled", "cancelled")]
    {
        let id = replica.create(json!({"title": "x"})).await;
        let claimed = call("/v1/worker/tasks/claim", json!({"task_id": id})).await.expect(200);
        assert_eq!((&claimed["success"], &claimed["task"]["id"]), (&json!(true), &json!(id)));
        assert_eq!(call("/v1/worker/tasks/claim", json!({"task_id": id})).await.status, 409);
        let body = json!({
            "task_id": id, "status": status, "result": "r", "error": "e", "session_id": "older",
        });
        call("/v1/worker/tasks/release", body.clone()).await.expect(200);
        assert_eq!(replica.task(&id).await["status"], stored);
    }
    replica.stream("worker_id=w").await;
    let connected = replica.get("/v1/worker/connected").await.expect(200);
    assert!(connected["workers"].is_array() && connected["count"].is_number());
}

#[tokio::test]
async fn a_cancellation_said_while_its_owner_was_away_is_told_when_it_is_back() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w").await;
    let id = replica.create(json!({"title": "x"})).await;
    assert_eq!(stream.announced().await, id);
    replica.claim(&id, "w").await.expect(200);
    drop(stream);
    replica.post(&format!("/v1/tasks/{id}/cancel"), json!({})).await.expect(200);
    let mut stream = replica.stream("worker_id=w").await;
    assert_eq!(stream.expect("task_cancelled").await.task(), id);
}

#[tokio::test]
async fn a_task_that_nobody_claimed_in_time_fails() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    db.execute("insert into tasks (title, expires_at) values ('x', now() + interval '1 s')").await;
    let id = db.value("select id from tasks").await;
    let failed = eventually("it has failed", async || {
        let task = replica.task(&id).await;
        (task["status"] == "failed").then_some(task)
    })
    .await;
    assert_eq!(failed["error"], "expired before it was claimed");
}
