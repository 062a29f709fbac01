//! Section 4 (create, batch, get, list) and section 7 of the protocol, as producers and operators
//! use them.

use std::collections::BTreeSet;

use futures_util::future::{join, join_all};
use serde_json::{Value, json};

use crate::support::raw::Soundness;
use crate::support::{Answer, Replica, TestDb};

async fn start() -> (TestDb, Replica) {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    (db, replica)
}

/// A create under an `Idempotency-Key`, with the body as it is.
async fn create_once(replica: &Replica, key: &str, body: &str) -> Answer {
    let request = replica.http("POST", "/v1/tasks").header("Idempotency-Key", key);
    let request = request.header("Content-Type", "application/json");
    replica.request(request.body(body.to_owned())).await
}

#[tokio::test]
async fn a_task_with_every_field_comes_back_as_it_was_given_and_is_stored_so() {
    let (db, replica) = start().await;
    let body = json!({
        "title": "Build component ☃", "prompt": "line 1\nline 2\t\u{1f4a5}", "codebase_id": "team/repo@v1.2:x",
        "priority": -7, "required_capabilities": ["build", "deploy"], "target_worker_id": "worker-1",
        "target_agent_name": "An Agent, Jr.", "agent_type": "build",
        "metadata": {"z": 1, "a": [true, null, 1.5, {"deep": "é"}], "": "empty key"},
        "run_at": "2030-01-31T12:00:00.123456Z", "expires_at": "2031-01-31T12:00:00+02:00",
        "max_attempts": 5, "timeout_seconds": 60,
    });
    let answer = replica.post("/v1/tasks", body.clone()).await;
    let location = answer.headers["location"].to_str().unwrap().to_owned();
    let created = answer.expect(201);
    let id = created["id"].as_str().unwrap();
    assert_eq!(location, format!("/v1/tasks/{id}"));
    assert_eq!(replica.get(&location).await.expect(200), created);
    let mut expected = body;
    expected["expires_at"] = json!("2031-01-31T10:00:00Z");
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&created[field], value, "{field}");
    }
    assert_eq!(
        (&created["status"], &created["attempt"], &created["claim_epoch"]),
        (&json!("pending"), &json!(0), &json!(0))
    );
    let row = db
        .value(
            "select title || '|' || prompt || '|' || codebase_id || '|' || priority || '|' || target_worker_id
                    || '|' || target_agent_name || '|' || agent_type || '|' || required_capabilities::text
                    || '|' || max_attempts || '|' || timeout_seconds || '|' || due
               from tasks where run_at = '2030-01-31 12:00:00.123456+00' and expires_at = '2031-01-31 10:00:00+00'",
        )
        .await;
    assert_eq!(
        row,
        "Build component ☃|line 1\nline 2\t\u{1f4a5}|team/repo@v1.2:x|-7|worker-1|An Agent, Jr.|build|{build,deploy}|5|60|false"
    );
}

#[tokio::test]
async fn a_title_is_enough_and_null_is_the_same_as_absent() {
    let (_db, replica) = start().await;
    let absent = replica.post("/v1/tasks", json!({"title": "x"})).await.expect(201);
    let nulls = json!({
        "title": "x", "prompt": null, "codebase_id": null, "target_worker_id": null, "target_agent_name": null,
        "agent_type": null, "metadata": null, "run_at": null, "expires_at": null, "max_attempts": null,
        "timeout_seconds": null,
    });
    let nulls = replica.post("/v1/tasks", nulls).await.expect(201);
    for mut task in [absent, nulls] {
        for field in ["id", "created_at", "run_at"] {
            assert!(
                task.as_object_mut().unwrap().remove(field).is_some_and(|value| value.is_string())
            );
        }
        let expected = json!({
            "title": "x", "status": "pending", "codebase_id": "global", "priority": 0, "required_capabilities": [],
            "target_worker_id": null, "target_agent_name": null, "agent_type": null, "prompt": null,
            "metadata": {}, "attempt": 0, "max_attempts": 3, "timeout_seconds": null, "claim_epoch": 0,
            "claimed_by": null, "expires_at": null, "claimed_at": null, "finished_at": null, "result": null,
            "error": null, "cancel_requested_at": null, "cancel_reason": null, "progress": null,
            "message": null, "checkpoint": null,
        });
        assert_eq!(task, expected);
    }
}

#[tokio::test]
async fn an_unknown_field_is_refused_with_its_name() {
    let (db, replica) = start().await;
    let answer = replica.post("/v1/tasks", json!({"title": "x", "prioritty": 1})).await;
    assert_eq!((answer.status, answer.problem().as_str()), (422, "invalid_body"));
    assert!(answer.json()["detail"].as_str().unwrap().contains("prioritty"));
    // Nor is a list of values in the order of our fields a task.
    let answer = replica.post("/v1/tasks", json!(["x"])).await;
    assert_eq!((answer.status, answer.problem().as_str()), (422, "invalid_body"));
    assert_eq!(db.value("select count(*) from tasks").await, "0");
}

#[tokio::test]
async fn a_create_repeated_with_its_key_makes_no_second_task_whatever_the_order_of_its_fields() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let first =
        create_once(&replicas[0], "key", r#"{"title":"x","metadata":{"a":1,"b":[1,2]}}"#).await;
    let first = first.expect(201);
    for same in [
        r#"{"title":"x","metadata":{"a":1,"b":[1,2]}}"#,
        "{ \"metadata\" : {\"b\": [1, 2],\n\"a\":1 },\t\"title\": \"\\u0078\" }  ",
    ] {
        for replica in &replicas {
            let again = create_once(replica, "key", same).await;
            let location = again.headers["location"].to_str().unwrap().to_owned();
            assert_eq!(location, format!("/v1/tasks/{}", first["id"].as_str().unwrap()));
            assert_eq!(again.expect(200), first);
        }
    }
    for other in [
        r#"{"title":"y","metadata":{"a":1,"b":[1,2]}}"#,
        r#"{"title":"x","metadata":{"a":1,"b":[2,1]}}"#,
        r#"{"title":"x"}"#,
    ] {
        let answer = create_once(&replicas[1], "key", other).await;
        assert_eq!((answer.status, answer.problem().as_str()), (409, "idempotency_key_taken"));
    }
    create_once(&replicas[1], "another key", r#"{"title":"x"}"#).await.expect(201);
    assert_eq!(db.value("select count(*) from tasks").await, "2");
    // The first task is the answer also when it has moved on.
    let id = first["id"].as_str().unwrap();
    replicas[0].post(&format!("/v1/tasks/{id}/cancel"), json!({})).await.expect(200);
    let again =
        create_once(&replicas[1], "key", r#"{"title":"x","metadata":{"a":1,"b":[1,2]}}"#).await;
    assert_eq!(again.expect(200)["status"], "cancelled");
}

#[tokio::test]
async fn of_concurrent_creates_with_one_key_on_two_replicas_exactly_one_makes_the_task() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    for replica in &replicas {
        Soundness::of(replica).await;
    }
    for round in 0..10 {
        let (key, body) = (format!("key {round}"), format!(r#"{{"title":"{round}"}}"#));
        let repeats = (0..40).map(|n| create_once(&replicas[n % 2], &key, &body));
        let answers = join_all(repeats).await;
        let made = answers.iter().filter(|answer| answer.status == 201).count();
        let found = answers.iter().filter(|answer| answer.status == 200).count();
        assert_eq!((made, found), (1, 39));
        let ids: BTreeSet<_> =
            answers.iter().map(|answer| answer.json()["id"].to_string()).collect();
        assert_eq!(ids.len(), 1);
    }
    assert_eq!(db.value("select count(*) from tasks").await, "10");
}

#[tokio::test]
async fn a_batch_makes_all_of_its_tasks_and_gives_their_ids_in_order() {
    let (db, replica) = start().await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    let tasks: Vec<_> = (0..50)
        .map(|n| json!({"title": format!("task {n}"), "priority": n % 3, "metadata": {"n": n}}))
        .collect();
    // A bare list, and one with a name.
    for body in [json!(tasks), json!({ "tasks": tasks })] {
        let answer = replica.post("/v1/tasks/batch", body).await.expect(201);
        assert_eq!(answer["count"], 50);
        let ids: Vec<_> =
            answer["ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
        for (n, id) in ids.iter().enumerate() {
            let task = replica.task(id).await;
            assert_eq!((&task["title"], &task["metadata"]["n"]), (&tasks[n]["title"], &json!(n)));
        }
        let heard: BTreeSet<_> = stream.announced_many(50).await.into_iter().collect();
        assert_eq!(heard, ids.iter().map(|id| (*id).to_owned()).collect());
    }
    assert_eq!(db.value("select count(*) from tasks").await, "100");
    let keyed = replica.http("POST", "/v1/tasks/batch").header("Idempotency-Key", "k");
    let answer = replica.request(keyed.json(&json!([{"title": "x"}]))).await;
    assert_eq!((answer.status, answer.problem().as_str()), (400, "invalid_parameter"));
    let unknown =
        replica.post("/v1/tasks/batch", json!({"tasks": [{"title": "x"}], "extra": 1})).await;
    assert_eq!((unknown.status, unknown.problem().as_str()), (422, "invalid_body"));
    assert!(unknown.json()["detail"].as_str().unwrap().contains("extra"));
}

/// Every id of a listing, page by page.
async fn pages(replica: &Replica, query: &str) -> Vec<String> {
    let (mut ids, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = replica.get(&format!("/v1/tasks?{query}{cursor}")).await.expect(200);
        let tasks = page["tasks"].as_array().expect("a list");
        ids.extend(tasks.iter().map(|task| task["id"].as_str().expect("an id").to_owned()));
        match &page["next_cursor"] {
            Value::Null => return ids,
            next => cursor = format!("&cursor={}", next.as_str().expect("a cursor")),
        }
    }
}

#[tokio::test]
async fn pages_hold_every_task_exactly_once_while_others_are_inserted() {
    let (db, replica) = start().await;
    // A batch shares one created_at: the cursor must go on in the middle of it.
    let mut before = BTreeSet::new();
    for _ in 0..3 {
        let batch = replica
            .post("/v1/tasks/batch", json!(vec![json!({"title": "x"}); 40]))
            .await
            .expect(201);
        before.extend(
            batch["ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()),
        );
    }
    let insert = async {
        for n in 0..60 {
            replica.create(json!({"title": format!("meanwhile {n}")})).await;
        }
    };
    let (found, ()) = join(pages(&replica, "limit=7"), insert).await;
    let once: BTreeSet<_> = found.iter().cloned().collect();
    assert_eq!(once.len(), found.len(), "no task twice");
    assert!(before.is_subset(&once), "no task left out");

    let newest_first = db
        .value("select string_agg(id::text, ' ' order by created_at desc, id desc) from tasks")
        .await;
    assert_eq!(pages(&replica, "limit=1000").await.join(" "), newest_first);
    assert_eq!(pages(&replica, "limit=50").await.join(" "), newest_first);
    assert_eq!(replica.get("/v1/tasks").await.expect(200)["tasks"].as_array().unwrap().len(), 100);
}

#[tokio::test]
async fn a_listing_is_narrowed_by_its_filters_and_leaves_large_fields_out() {
    let (_db, replica) = start().await;
    replica.register("w", &["a"], &[]).await;
    let done = replica.create(json!({"title": "done", "codebase_id": "a", "prompt": "p"})).await;
    let held = replica.create(json!({"title": "held"})).await;
    let free = replica.create(json!({"title": "free", "codebase_id": "a"})).await;
    for id in [&done, &held] {
        replica.claim(id, "w").await.expect(200);
    }
    replica.finish("complete", &done, "w", json!({"result": 1})).await.expect(200);
    let time = replica.task(&held).await["created_at"].as_str().unwrap().to_owned();
    let zoned = time.replace('Z', "%2B00:00");
    let raw_plus = time.replace('Z', "+00:00");
    for (query, expected) in [
        (String::new(), vec![&free, &held, &done]),
        ("status=pending".into(), vec![&free]),
        ("status=running".into(), vec![&held]),
        ("status=failed".into(), vec![]),
        ("codebase_id=a".into(), vec![&free, &done]),
        ("codebase_id=a&status=completed".into(), vec![&done]),
        ("worker_id=w".into(), vec![&held, &done]),
        (format!("created_after={time}"), vec![&free]),
        (format!("created_before={zoned}"), vec![&done]),
        (format!("created_before={raw_plus}"), vec![&done]),
        ("limit=2&limit=2".into(), vec![&free, &held, &done]),
    ] {
        let found = pages(&replica, &query).await;
        assert_eq!(found.iter().collect::<Vec<_>>(), expected, "{query}");
    }
    let listed = replica.get("/v1/tasks?status=completed").await.expect(200)["tasks"][0].clone();
    let whole = replica.task(&done).await;
    for (field, value) in whole.as_object().unwrap() {
        let large = ["prompt", "metadata", "result", "checkpoint"].contains(&field.as_str());
        assert_eq!(listed.get(field), (!large).then_some(value), "{field}");
    }
}

#[tokio::test]
async fn a_filter_that_is_misspelt_never_lists_everything() {
    let (_db, replica) = start().await;
    for (query, code) in [
        ("state=pending", "invalid_query"),
        ("Status=pending", "invalid_query"),
        ("limit=1&x", "invalid_query"),
        ("status=open", "invalid_parameter"),
        ("status=", "invalid_parameter"),
        ("status=pending&status=running", "invalid_parameter"),
        ("codebase_id=", "invalid_parameter"),
        ("worker_id=a%20b", "invalid_parameter"),
        ("created_after=yesterday", "invalid_parameter"),
        ("created_before=2030-01-01", "invalid_parameter"),
        ("limit=0", "invalid_parameter"),
        ("limit=1001", "invalid_parameter"),
        ("limit=ten", "invalid_parameter"),
        ("cursor=", "invalid_parameter"),
        ("cursor=1_x", "invalid_parameter"),
    ] {
        let answer = replica.get(&format!("/v1/tasks?{query}")).await;
        assert_eq!((answer.status, answer.problem().as_str()), (400, code), "{query}");
    }
}

#[tokio::test]
async fn a_task_that_is_not_there_is_a_404_whatever_its_id_looks_like() {
    let (_db, replica) = start().await;
    for id in ["00000000-0000-0000-0000-000000000000", "task-abc", "%00", "a%2Fb", "%F0%9F%92%A5"] {
        let answer = replica.get(&format!("/v1/tasks/{id}")).await;
        assert_eq!((answer.status, answer.problem().as_str()), (404, "task_not_found"));
    }
}

#[tokio::test]
async fn health_readiness_and_metrics_say_how_it_is() {
    let (_db, replica) = start().await;
    let alive = replica.get("/healthz").await.expect(200);
    assert_eq!(
        (&alive["status"], &alive["version"]),
        (&json!("ok"), &json!(env!("CARGO_PKG_VERSION")))
    );
    let _stream = replica.stream("worker_id=w").await;
    replica.create(json!({"title": "x"})).await;
    let ready = replica.get("/readyz").await.expect(200);
    assert_eq!((&ready["status"], &ready["streams"]), (&json!("ready"), &json!(1)));

    let answer = replica.get("/metrics").await;
    assert!(
        answer.headers["content-type"]
            .to_str()
            .unwrap()
            .starts_with("application/openmetrics-text")
    );
    let mut values = Vec::new();
    for line in answer.text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let kind = comment.split(' ').next().unwrap();
            assert!(["HELP", "TYPE", "UNIT", "EOF"].contains(&kind), "{line}");
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
        let bare = name.split('{').next().unwrap();
        assert!(bare.starts_with("taskwire_"), "{line}");
        assert!(bare.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{line}");
        assert!(name == bare || (name.ends_with("\"}") && name.contains("=\"")), "{line}");
        values.push((name.to_owned(), value));
    }
    assert!(answer.text.ends_with("# EOF\n"));
    for (name, value) in [("taskwire_streams_open", 1.0), ("taskwire_tasks_created_total", 1.0)] {
        assert!(values.contains(&(name.to_owned(), value)), "{name} in {values:?}");
    }
    let names: BTreeSet<_> = values.iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), values.len(), "no name twice");
}
