//! S1 to S9: who hears of what, when, and how a stream ends.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{PATIENCE, Replica, SseStream, TestDb, eventually};

#[tokio::test]
async fn s1_a_worker_can_name_itself_in_three_ways_or_be_given_an_id() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    for (query, headers, id) in [
        ("worker_id=by-query", vec![], Some("by-query")),
        ("", vec![("X-Worker-ID", "by-header")], Some("by-header")),
        ("", vec![("worker_id", "by-old-header")], Some("by-old-header")),
        ("worker_id=same", vec![("X-Worker-ID", "same"), ("worker_id", "same")], Some("same")),
        ("", vec![], None),
    ] {
        let mut stream = SseStream::open(&replica.url, query, &headers).await;
        let connected = stream.expect("connected").await.data;
        assert_eq!(connected["message"], "SSE connection established");
        let given = connected["worker_id"].as_str().unwrap();
        assert!(id.is_none_or(|id| id == given), "{connected}");
        // A worker that never registered is registered by connecting.
        let status = replica.get(&format!("/v1/workers/{given}/status")).await.expect(200);
        assert_eq!((&status["registered"], &status["connected"]), (&json!(true), &json!(true)));
    }
    for headers in [vec![("X-Worker-ID", "b")], vec![("worker_id", "b")]] {
        let mut request = replica.http("GET", "/v1/worker/tasks/stream?worker_id=a");
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let answer = replica.request(request).await;
        assert_eq!((answer.status, answer.problem().as_str()), (400, "worker_id_conflict"));
    }
}

#[tokio::test]
async fn s2_routing_headers_replace_the_registration_and_absent_ones_keep_it() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &["registered"], &["build"]).await;
    let routing = async || {
        let status = replica.get("/v1/workers/w/status").await.expect(200);
        (status["codebases"].clone(), status["capabilities"].clone())
    };

    drop(replica.stream("worker_id=w").await);
    assert_eq!(routing().await, (json!(["registered"]), json!(["build"])));

    let headers = [("X-Codebases", "my-project, api,,"), ("X-Capabilities", "agent,test")];
    drop(SseStream::open(&replica.url, "worker_id=w", &headers).await);
    assert_eq!(routing().await, (json!(["api", "my-project"]), json!(["agent", "test"])));

    drop(replica.stream("worker_id=w&codebases=x&capabilities=y").await);
    assert_eq!(routing().await, (json!(["x"]), json!(["y"])));

    drop(SseStream::open(&replica.url, "worker_id=w", &[("X-Codebases", "")]).await);
    assert_eq!(routing().await, (json!([]), json!(["y"])));
}

#[tokio::test]
async fn s3_head_and_connected_leave_at_once_and_say_that_nothing_may_buffer_them() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let address = replica.url.strip_prefix("http://").unwrap();
    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = "GET /v1/worker/tasks/stream?worker_id=raw HTTP/1.1\r\nHost: x\r\n\r\n";
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    let begun = Instant::now();
    while !text.contains("event: connected\n") || !text.ends_with("\n\n\r\n") {
        let mut bytes = [0; 4096];
        let count = tokio::time::timeout(PATIENCE, socket.read(&mut bytes)).await.unwrap().unwrap();
        assert!(count > 0, "{text}");
        text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let head = head.to_ascii_lowercase();
    for line in [
        "content-type: text/event-stream",
        "cache-control: no-cache, no-transform",
        "x-accel-buffering: no",
    ] {
        assert!(head.lines().any(|found| found == line), "{line} in {head}");
    }
    let retry = body.lines().find_map(|line| line.strip_prefix("retry: ")).unwrap();
    assert!((500..3_000).contains(&retry.parse().unwrap()), "{retry}");
}

#[tokio::test]
async fn s4_a_task_is_announced_and_then_pushed_whole() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&codebases=my-project&capabilities=build").await;
    let id = replica
        .create(json!({
            "title": "Build component", "codebase_id": "my-project", "priority": 7, "prompt": "go",
            "required_capabilities": ["build"], "metadata": {"a": [1, {"b": null}]},
        }))
        .await;
    let available = stream.next().await;
    assert_eq!(available.name, "task_available");
    assert_eq!(available.data["task_id"], id.as_str());
    assert_eq!(available.data["title"], "Build component");
    assert_eq!(available.data["priority"], 7);
    assert_eq!(available.data["codebase_id"], "my-project");
    assert_eq!(available.data["required_capabilities"], json!(["build"]));
    assert!(available.data["created_at"].is_string());
    let task = stream.next().await;
    assert_eq!(task.name, "task");
    assert_eq!(task.data, replica.task(&id).await, "the same object as GET gives");
}

#[tokio::test]
async fn s4_a_stream_may_leave_the_task_events_out() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    let ids =
        [replica.create(json!({"title": "1"})).await, replica.create(json!({"title": "2"})).await];
    for id in ids {
        let event = stream.next().await;
        assert_eq!((event.name.as_str(), event.task()), ("task_available", id.as_str()));
    }
}

#[tokio::test]
async fn s4_silence_is_broken_by_keepalives() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--worker-sse-keepalive", "1"]).await;
    let mut stream = replica.stream("worker_id=w").await;
    let begun = Instant::now();
    for _ in 0..2 {
        let event = stream.next().await;
        assert_eq!((event.name.as_str(), &event.data), ("keepalive", &json!({})));
    }
    assert!(begun.elapsed() >= Duration::from_millis(1_900), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn s4_the_backlog_comes_best_first_and_then_live_follows() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut expected = Vec::new();
    for (title, priority) in [("low", -1), ("old", 0), ("young", 0), ("urgent", 9)] {
        expected.push(replica.create(json!({"title": title, "priority": priority})).await);
    }
    expected.rotate_left(3);
    expected[1..].rotate_left(1);
    let mut stream = replica.stream("worker_id=w").await;
    assert_eq!(stream.announced_many(4).await, expected);
    let live = replica.create(json!({"title": "live"})).await;
    assert_eq!(stream.announced().await, live);
}

#[tokio::test]
async fn s5_tasks_created_around_a_connect_are_announced_once_each() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    for round in 0..10 {
        let codebase = format!("round-{round}");
        let create = async {
            let mut ids = Vec::new();
            for n in 0..30 {
                let body = json!({"title": format!("{n}"), "codebase_id": codebase});
                ids.push(replicas[n % 2].create(body).await);
            }
            ids
        };
        let query = format!("worker_id=w-{round}&codebases={codebase}&events=task_available");
        let (mut ids, mut stream) = tokio::join!(create, replicas[0].stream(&query));
        let mut heard = stream.announced_many(ids.len()).await;
        // A repeat would come before the sentinel.
        let sentinel =
            replicas[1].create(json!({"title": "sentinel", "codebase_id": codebase})).await;
        assert_eq!(stream.announced().await, sentinel);
        ids.sort();
        heard.sort();
        assert_eq!(heard, ids);
    }
}

#[tokio::test]
async fn s6_tasks_are_announced_within_two_seconds_when_every_notification_is_lost() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w").await;
    db.execute("alter table tasks disable trigger all").await;
    for n in 0..3 {
        let begun = Instant::now();
        let id = replica.create(json!({"title": format!("{n}")})).await;
        assert_eq!(stream.announced().await, id);
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn s6_a_late_commit_is_swept_up_although_its_notification_is_lost() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    db.execute("alter table tasks disable trigger all").await;
    let mut late = db.pool.begin().await.unwrap();
    let row: (sqlx::types::Uuid,) =
        sqlx::query_as("insert into tasks (title) values ('late') returning id")
            .fetch_one(&mut *late)
            .await
            .unwrap();
    // Tasks that come and go meanwhile move the sweep's horizon past the open transaction's start.
    for n in 0..3 {
        let id = replica.create(json!({"title": format!("{n}")})).await;
        assert_eq!(stream.announced().await, id);
    }
    late.commit().await.unwrap();
    assert_eq!(stream.announced().await, row.0.to_string());
}

#[tokio::test]
async fn s6_what_happened_while_the_listener_was_gone_is_announced() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w").await;
    for n in 0..5 {
        db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity
              where application_name = 'taskwire listener' and datname = current_database()",
        )
        .await;
        let id = replica.create(json!({"title": format!("{n}")})).await;
        assert_eq!(stream.announced().await, id);
    }
    assert!(replica.log().contains("listener lost"), "{}", replica.log());
}

#[tokio::test]
async fn s7_a_newer_stream_ends_the_older_one_on_whatever_replica() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let mut streams = Vec::new();
    for n in 0..4 {
        streams.push(replicas[n % 2].stream("worker_id=w").await);
    }
    let mut newest = streams.pop().unwrap();
    for older in &mut streams {
        let error = older.expect("error").await.data;
        assert_eq!((&error["code"], &error["reconnect"]), (&json!("superseded"), &json!(false)));
        assert!(older.has_ended().await);
    }
    // The clean-up after the older ones leaves the newest one's presence alone.
    let id = replicas[0].create(json!({"title": "x"})).await;
    assert_eq!(newest.announced().await, id);
    let connected = replicas[0].get("/v1/workers/connected").await.expect(200);
    assert_eq!(connected.as_array().unwrap().len(), 1);
    assert_eq!(connected[0]["replica_address"], replicas[1].url.strip_prefix("http://").unwrap());
}

#[tokio::test]
async fn s8_a_window_holds_back_and_goes_on_with_the_best_as_tasks_are_settled() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--worker-sse-window", "4"]).await;
    let other = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    replica.register("other", &[], &[]).await;
    let mut waiting = Vec::new();
    for n in 0..12 {
        waiting.push(replica.create(json!({"title": format!("{n}")})).await);
    }
    assert_eq!(stream.announced_many(4).await, waiting[..4]);
    // Full for its priority, but not for what is more important.
    let urgent = replica.create(json!({"title": "urgent", "priority": 5})).await;
    assert_eq!(stream.announced().await, urgent);
    // Somebody else takes what this worker was told of, by another replica.
    for id in waiting[..4].iter().chain([&urgent]) {
        other.claim(id, "other").await.expect(200);
    }
    assert_eq!(stream.announced_many(4).await, waiting[4..8]);
    // The worker itself claims and is refused.
    for id in &waiting[4..8] {
        replica.claim(id, "w").await.expect(200);
    }
    assert_eq!(stream.announced_many(4).await, waiting[8..12]);
}

#[tokio::test]
async fn s8_a_large_task_is_pushed_in_part_and_claimed_whole() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w").await;
    let prompt = "é".repeat(500_000);
    let id =
        replica.create(json!({"title": "large", "prompt": prompt, "metadata": {"k": "v"}})).await;
    assert_eq!(stream.announced().await, id);
    let task = stream.next().await.data;
    assert_eq!((&task["partial"], task["id"].as_str()), (&json!(true), Some(id.as_str())));
    assert!(task.get("prompt").is_none() && task.get("metadata").is_none());
    let claimed = replica.claim(&id, "w").await.expect(200);
    assert_eq!(
        (claimed["prompt"].as_str().unwrap(), &claimed["metadata"]["k"]),
        (prompt.as_str(), &json!("v"))
    );
}

#[tokio::test]
async fn s9_streams_can_be_switched_off() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--worker-sse-enabled", "false"]).await;
    let answer = replica.get("/v1/worker/tasks/stream?worker_id=w").await;
    assert_eq!((answer.status, answer.problem().as_str()), (503, "sse_disabled"));
    replica.create(json!({"title": "the rest works"})).await;
}

#[tokio::test]
async fn s9_a_worker_that_fell_silent_is_not_connected_any_more_and_loses_its_claims() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--worker-sse-timeout", "2"]).await;
    let count = async || {
        let connected = replica.get("/v1/workers/connected").await.expect(200);
        connected.as_array().unwrap().len()
    };
    // A call is a sign of life, also without a stream.
    replica.register("caller", &[], &[]).await;
    let id = replica.create(json!({"title": "x"})).await;
    let claim = replica.claim(&id, "caller").await.expect(200);
    assert_eq!((count().await, &claim["lease_expires_in"]), (1, &json!(2)));

    eventually("the silent worker is not connected", async || (count().await == 0).then_some(()))
        .await;
    let task = eventually("its claim is released", async || {
        let task = replica.task(&id).await;
        (task["status"] == "pending").then_some(task)
    })
    .await;
    assert_eq!((&task["claimed_by"], &task["attempt"]), (&json!(null), &json!(1)));
}

#[tokio::test]
async fn a_stream_keeps_its_owners_claims_and_its_end_starts_the_countdown() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--lease-seconds", "1"]).await;
    let stream = replica.stream("worker_id=w").await;
    let id = replica.create(json!({"title": "x"})).await;
    replica.claim(&id, "w").await.expect(200);
    // The lease lapses and is moved on, three times.
    for _ in 0..3 {
        let before = db.value("select lease_expires_at from tasks").await;
        eventually("the lease moves on", async || {
            (db.value("select lease_expires_at from tasks").await != before).then_some(())
        })
        .await;
        assert_eq!(replica.task(&id).await["status"], "running");
    }
    drop(stream);
    eventually("the claim is given back", async || {
        (replica.task(&id).await["status"] == "pending").then_some(())
    })
    .await;
}

#[tokio::test]
async fn s10_a_drained_replica_says_goodbye_to_its_streams_and_exits_in_time() {
    let db = TestDb::new().await;
    let mut replica = Replica::start(&db).await;
    let other = Replica::start(&db).await;
    let mut streams = Vec::new();
    for n in 0..5 {
        streams.push(replica.stream(&format!("worker_id=w-{n}")).await);
    }
    replica.signal("TERM");
    for stream in &mut streams {
        let error = stream.expect("error").await.data;
        assert_eq!((&error["code"], &error["reconnect"]), (&json!("draining"), &json!(true)));
        assert!(stream.has_ended().await);
    }
    let status = replica.ends_within(Duration::from_secs(4)).await;
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
    eventually("nobody is connected any more", async || {
        let connected = other.get("/v1/workers/connected").await.expect(200);
        connected.as_array().unwrap().is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_task_that_a_worker_may_not_claim_is_told_it_again_when_it_may() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&codebases=x&events=task_available").await;
    let id = replica.create(json!({"title": "x", "codebase_id": "x"})).await;
    assert_eq!(stream.announced().await, id);
    let set = async |codebases: serde_json::Value| {
        let path = "/v1/worker/codebases?worker_id=w";
        let call = replica.http("PUT", path).json(&json!({"codebases": codebases}));
        replica.request(call).await.expect(200);
    };
    set(json!([])).await;
    assert_eq!(replica.claim(&id, "w").await.status, 403);
    set(json!(["x"])).await;
    assert_eq!(stream.announced().await, id);
    replica.claim(&id, "w").await.expect(200);
}
