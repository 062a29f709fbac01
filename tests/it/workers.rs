//! Section 5 of the protocol: registration, presence over all replicas, codebases, farewell.

use serde_json::{Value, json};

use crate::support::{Replica, TestDb, eventually};

async fn two_replicas() -> (TestDb, [Replica; 2]) {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    (db, replicas)
}

async fn register(replica: &Replica, body: Value) -> Value {
    replica.post("/v1/agent/workers/register", body).await.expect(200)
}

async fn status(replica: &Replica, worker: &str) -> Value {
    replica.get(&format!("/v1/workers/{worker}/status")).await.expect(200)
}

async fn put_codebases(replica: &Replica, worker: &str, codebases: &[&str]) -> Value {
    let request = replica.http("PUT", "/v1/worker/codebases").header("X-Worker-ID", worker);
    let answer = replica.request(request.json(&json!({ "codebases": codebases }))).await;
    answer.expect(200)
}

#[tokio::test]
async fn a_worker_without_an_id_is_given_a_new_one() {
    let (_db, replicas) = two_replicas().await;
    let body = json!({"name": "builder", "capabilities": ["build"], "hostname": "host-1"});
    let first = register(&replicas[0], body.clone()).await;
    let second = register(&replicas[1], body).await;
    assert_eq!((&first["name"], &first["registered"]), (&json!("builder"), &json!(true)));
    assert_ne!(first["worker_id"], second["worker_id"]);
    let known = status(&replicas[1], first["worker_id"].as_str().unwrap()).await;
    assert_eq!(
        (&known["name"], &known["capabilities"], &known["hostname"], &known["codebases"]),
        (&json!("builder"), &json!(["build"]), &json!("host-1"), &json!([]))
    );
    // A name is not needed: the id is one.
    assert_eq!(register(&replicas[0], json!({"worker_id": "w"})).await["name"], "w");
}

#[tokio::test]
async fn the_same_worker_id_updates_what_it_mentions_and_keeps_the_rest() {
    let (db, replicas) = two_replicas().await;
    let first = json!({
        "worker_id": "w", "name": "first", "capabilities": ["b", "a", "b"], "codebases": ["x"], "hostname": "h",
        "metadata": {"k": 1},
    });
    register(&replicas[0], first).await;
    let known = status(&replicas[1], "w").await;
    assert_eq!(known["capabilities"], json!(["a", "b"]), "sorted, and no repeats");
    let second = json!({"worker_id": "w", "name": "second", "codebases": []});
    assert_eq!(register(&replicas[1], second).await["worker_id"], "w");
    let known = status(&replicas[0], "w").await;
    let expected = json!({
        "name": "second", "capabilities": ["a", "b"], "codebases": [], "hostname": "h", "metadata": {"k": 1},
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&known[field], value, "{field}");
    }
    assert_eq!(db.value("select count(*) from workers").await, "1");
}

#[tokio::test]
async fn e2_a_registration_keeps_what_it_does_not_know_in_metadata() {
    let (_db, replicas) = two_replicas().await;
    let body = json!({
        "worker_id": "w", "name": "older", "models": ["m-1"], "global_codebase_id": "g", "metadata": {"own": true},
    });
    register(&replicas[0], body).await;
    let expected = json!({"models": ["m-1"], "global_codebase_id": "g", "own": true});
    assert_eq!(status(&replicas[1], "w").await["metadata"], expected);
}

#[tokio::test]
async fn every_registered_worker_is_listed() {
    let (_db, replicas) = two_replicas().await;
    for (n, worker) in ["c", "a", "b"].into_iter().enumerate() {
        replicas[n % 2].register(worker, &[], &[]).await;
    }
    let _stream = replicas[0].stream("worker_id=by-stream&agent_name=Connected").await;
    let listed = replicas[1].get("/v1/agent/workers").await.expect(200);
    let names: Vec<_> =
        listed.as_array().unwrap().iter().map(|w| (&w["worker_id"], &w["name"])).collect();
    let expected = [("a", "a"), ("b", "b"), ("by-stream", "Connected"), ("c", "c")]
        .map(|(i, n)| (json!(i), json!(n)));
    assert_eq!(names, expected.iter().map(|(id, name)| (id, name)).collect::<Vec<_>>());
}

#[tokio::test]
async fn the_connected_workers_of_all_replicas_are_listed_by_each() {
    let (_db, replicas) = two_replicas().await;
    let on_first = replicas[0].stream("worker_id=first&codebases=a").await;
    let _on_second = replicas[1].stream("worker_id=second&capabilities=b").await;
    for replica in &replicas {
        let connected = replica.get("/v1/workers/connected").await.expect(200);
        let [first, second] = &connected.as_array().unwrap()[..] else { panic!("{connected}") };
        for (worker, id, home) in [(first, "first", &replicas[0]), (second, "second", &replicas[1])]
        {
            assert_eq!(worker["worker_id"], id);
            assert_eq!(worker["replica_address"], home.url.strip_prefix("http://").unwrap());
            assert!(worker["connected_at"].is_string() && worker["last_heartbeat"].is_string());
        }
        assert_eq!((&first["codebases"], &second["capabilities"]), (&json!(["a"]), &json!(["b"])));
        let older = replica.get("/v1/worker/connected").await.expect(200);
        assert_eq!((&older["count"], &older["workers"]), (&json!(2), &connected));
    }
    drop(on_first);
    eventually("who left is not connected any more, for the other replica too", async || {
        let connected = replicas[1].get("/v1/workers/connected").await.expect(200);
        (connected.as_array().unwrap().len() == 1).then_some(())
    })
    .await;
    assert_eq!(status(&replicas[1], "first").await["connected"], false);
}

#[tokio::test]
async fn a_workers_status_tells_its_replica_its_running_tasks_and_its_last_sign_of_life() {
    let (_db, replicas) = two_replicas().await;
    let stream = replicas[0].stream("worker_id=w&codebases=a").await;
    let task = replicas[1].create(json!({"title": "held", "codebase_id": "a"})).await;
    replicas[1].claim(&task, "w").await.expect(200);
    let known = status(&replicas[1], "w").await;
    assert_eq!((&known["registered"], &known["connected"]), (&json!(true), &json!(true)));
    assert_eq!(known["replica_address"], replicas[0].url.strip_prefix("http://").unwrap());
    assert_eq!(known["worker_id"], stream.worker_id.as_str());
    let running = &known["running_tasks"];
    assert_eq!(running.as_array().unwrap().len(), 1);
    assert_eq!(
        (&running[0]["id"], &running[0]["title"], &running[0]["claim_epoch"]),
        (&json!(task), &json!("held"), &json!(1))
    );
    for field in ["registered_at", "connected_at", "last_heartbeat", "replica_id", "connection_id"]
    {
        assert!(known[field].is_string(), "{field}: {known}");
    }
    replicas[0].finish("complete", &task, "w", json!({})).await.expect(200);
    assert_eq!(status(&replicas[1], "w").await["running_tasks"], json!([]));
    let unknown = replicas[0].get("/v1/workers/nobody/status").await;
    assert_eq!((unknown.status, unknown.problem().as_str()), (404, "worker_not_found"));
}

#[tokio::test]
async fn new_codebases_are_announced_on_the_open_stream_wherever_the_call_lands() {
    let (_db, replicas) = two_replicas().await;
    let mut stream = replicas[0].stream("worker_id=w&codebases=old&events=task_available").await;
    let mut before = replicas.each_ref().map(|_| String::new());
    for (n, codebase) in ["by-own", "by-other"].into_iter().enumerate() {
        before[n] = replicas[0].create(json!({"title": "waits", "codebase_id": codebase})).await;
    }
    // By its own replica, then by the other one.
    for (n, codebase) in ["by-own", "by-other"].into_iter().enumerate() {
        let answer = put_codebases(&replicas[n], "w", &[codebase]).await;
        assert_eq!(answer, json!({"worker_id": "w", "codebases": [codebase]}));
        assert_eq!(stream.announced().await, before[n], "what was there already");
        let live = replicas[1].create(json!({"title": "live", "codebase_id": codebase})).await;
        assert_eq!(stream.announced().await, live);
        // What does not match any more is not announced: it would come before the sentinel.
        for gone in &["old", "by-own"][..=n] {
            let task = json!({"title": "not for w now", "codebase_id": gone});
            replicas[0].create(task).await;
        }
        let sentinel = replicas[0].create(json!({"title": "sentinel"})).await;
        assert_eq!(stream.announced().await, sentinel);
    }
    let unknown = replicas[0].http("PUT", "/v1/worker/codebases");
    let unknown = unknown.json(&json!({"worker_id": "nobody", "codebases": []}));
    assert_eq!(replicas[0].request(unknown).await.problem(), "worker_not_found");
    let nobody = replicas[0].http("PUT", "/v1/worker/codebases").json(&json!({"codebases": []}));
    assert_eq!(replicas[0].request(nobody).await.problem(), "worker_id_missing");
}

#[tokio::test]
async fn a_heartbeat_is_a_sign_of_life_and_of_nobody_unknown() {
    let (db, replicas) = two_replicas().await;
    replicas[0].register("w", &[], &[]).await;
    db.execute("update workers set last_seen_at = now() - interval '1 hour'").await;
    assert_eq!(status(&replicas[0], "w").await["connected"], false);
    let path = "/v1/agent/workers/w/heartbeat";
    let answer = replicas[1].post(path, json!({})).await.expect(200);
    assert_eq!(answer, json!({"worker_id": "w", "timeout_seconds": 300}));
    assert_eq!(status(&replicas[0], "w").await["connected"], true);
    let bare = replicas[1].request(replicas[1].http("POST", path)).await;
    assert_eq!(bare.status, 200, "a body is not needed");
    for verb in ["heartbeat", "unregister"] {
        let answer = replicas[1].post(&format!("/v1/agent/workers/nobody/{verb}"), json!({})).await;
        assert_eq!((answer.status, answer.problem().as_str()), (404, "worker_not_found"));
    }
}

#[tokio::test]
async fn a_farewell_gives_the_claims_back_at_no_attempts_cost_and_ends_the_stream() {
    let (db, replicas) = two_replicas().await;
    let mut other = replicas[1].stream("worker_id=other").await;
    let task = replicas[0].create(json!({"title": "x", "max_attempts": 1})).await;
    assert_eq!(other.announced().await, task);
    let mut stream = replicas[0].stream("worker_id=w").await;
    assert_eq!(stream.announced().await, task);
    replicas[0].claim(&task, "w").await.expect(200);

    // The call lands on the replica that does not have the stream.
    let farewell = replicas[1].post("/v1/agent/workers/w/unregister", json!({})).await.expect(200);
    assert_eq!(farewell, json!({"worker_id": "w", "registered": false, "released_tasks": 1}));
    // The released task may be announced to it once more before its end is.
    let error = loop {
        let event = stream.next().await;
        if !event.name.starts_with("task") {
            break event;
        }
    };
    assert_eq!(error.name, "error");
    assert_eq!(
        (&error.data["code"], &error.data["reconnect"]),
        (&json!("unregistered"), &json!(false))
    );
    assert!(stream.has_ended().await);
    let released = replicas[0].task(&task).await;
    assert_eq!((&released["status"], &released["attempt"]), (&json!("pending"), &json!(0)));
    assert_eq!(other.announced().await, task, "it is offered to the others again");
    assert_eq!(replicas[0].claim(&task, "w").await.problem(), "unknown_worker");
    let answer = replicas[0].get("/v1/workers/w/status").await;
    assert_eq!((answer.status, answer.problem().as_str()), (404, "worker_not_found"));
    assert_eq!(db.value("select count(*) from streams").await, "1");
    // It may come back.
    replicas[0].stream("worker_id=w").await;
}

#[tokio::test]
async fn a_head_request_for_the_stream_ends_no_stream_of_the_worker() {
    let (_db, replicas) = two_replicas().await;
    let mut stream = replicas[0].stream("worker_id=w").await;
    for replica in &replicas {
        let head =
            replica.request(replica.http("HEAD", "/v1/worker/tasks/stream?worker_id=w")).await;
        assert_eq!(
            (head.status, &head.headers["content-type"]),
            (200, &"text/event-stream".parse().unwrap())
        );
    }
    let task = replicas[1].create(json!({"title": "x"})).await;
    assert_eq!(stream.announced().await, task);
}
