//! E2: each limit to the unit. What is just allowed is stored unchanged; one more is refused.

use serde_json::{Value, json};

use crate::support::raw::{Soundness, exchange, json_request};
use crate::support::{Answer, Replica, TestDb};

const MIB: usize = 1024 * 1024;

async fn start() -> (TestDb, Replica) {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    (db, replica)
}

/// A create with one field set, and the field as it is read back.
async fn stored(replica: &Replica, field: &str, value: &Value) -> Value {
    let mut body = json!({"title": "x"});
    body[field] = value.clone();
    let created = replica.post("/v1/tasks", body).await.expect(201);
    let read = replica.task(created["id"].as_str().expect("an id")).await;
    assert_eq!(created, read);
    read[field].clone()
}

#[track_caller]
fn assert_invalid(answer: &Answer, field: &str) {
    let (status, code) = (answer.status, answer.problem());
    assert_eq!((status, code.as_str()), (422, "invalid_field"), "{:.300}", answer.text);
    assert_eq!(answer.json()["field"], field);
    assert!(answer.json()["detail"].as_str().expect("a text").contains(field));
}

#[tokio::test]
async fn e2_a_tasks_fields_are_stored_unchanged_up_to_their_limits_and_refused_beyond() {
    let (db, replica) = start().await;
    let id = "aZ09._:/@-".repeat(13);
    let metadata = |bytes: usize| json!({"k": "m".repeat(bytes - r#"{"k":""}"#.len())});
    let ids = |count: usize| (0..count).map(|n| format!("{n:0128}")).collect::<Vec<_>>();
    let cases = [
        ("title", json!("t"), json!("")),
        ("title", json!("t".repeat(500)), json!("t".repeat(501))),
        ("title", json!("é".repeat(500)), json!("é".repeat(501))),
        ("title", json!("💥".repeat(500)), json!("💥".repeat(501))),
        ("prompt", json!("p".repeat(MIB)), json!("p".repeat(MIB + 1))),
        ("prompt", json!("é".repeat(MIB / 2)), json!("é".repeat(MIB / 2) + "p")),
        ("metadata", metadata(256 * 1024), metadata(256 * 1024 + 1)),
        ("codebase_id", json!(id[..128]), json!(id[..129])),
        ("target_worker_id", json!(id[..128]), json!(id[..129])),
        ("agent_type", json!(id[..128]), json!(id[..129])),
        ("target_agent_name", json!("é".repeat(128)), json!("é".repeat(129))),
        ("required_capabilities", json!(ids(100)), json!(ids(101))),
        ("required_capabilities", json!([id[..128]]), json!([id[..129]])),
        ("priority", json!(i32::MAX), Value::Null),
        ("priority", json!(i32::MIN), Value::Null),
        ("max_attempts", json!(1), json!(0)),
        ("max_attempts", json!(1000), json!(1001)),
        ("timeout_seconds", json!(1), json!(0)),
        ("timeout_seconds", json!(31_536_000), json!(31_536_001)),
        ("run_at", json!("1970-01-01T00:00:00Z"), json!("1969-12-31T23:59:59Z")),
        ("expires_at", json!("9999-12-31T23:59:59.999999Z"), json!("0001-01-01T00:00:00Z")),
    ];
    let mut accepted = 0;
    for (field, right, wrong) in cases {
        assert!(stored(&replica, field, &right).await == right, "{field}");
        accepted += 1;
        if !wrong.is_null() {
            let body = json!({"title": "x", field: wrong});
            let body = if field == "title" { json!({ "title": wrong }) } else { body };
            assert_invalid(&replica.post("/v1/tasks", body).await, field);
        }
    }
    assert_eq!(db.value("select count(*) from tasks").await, accepted.to_string());
}

#[tokio::test]
async fn e2_metadata_counts_as_postgres_writes_it_so_that_few_bytes_cannot_become_many() {
    let (db, replica) = start().await;
    // 1e308 has 309 digits in Postgres: 250 KB of them would be 11 MB, again for every reader.
    for number in ["1e308", "1e-300"] {
        let numbers = vec![number; 36_000].join(",");
        let body = format!(r#"{{"title":"x","metadata":{{"a":[{numbers}]}}}}"#);
        let bytes = json_request("POST", "/v1/tasks", body.as_bytes());
        assert_invalid(&exchange(&replica, &bytes).await.expect("an answer"), "metadata");
    }
    assert_eq!(db.value("select count(*) from tasks").await, "0");
    let few = json!({"a": [1e308, -1e308, 1e-300, 0.1, 1e15, u64::MAX, i64::MIN]});
    assert_eq!(stored(&replica, "metadata", &few).await, few);
}

#[tokio::test]
async fn e1_json_with_a_key_that_our_own_reader_takes_for_a_command_is_refused() {
    let (_db, replica) = start().await;
    // serde_json reads an object that begins with this key as the JSON in its text. Postgres puts
    // shorter keys first, so it must not stand anywhere.
    let key = "$serde_json::private::RawValue";
    let longer = "l".repeat(40);
    for metadata in [json!({ key: "x" }), json!({ longer.as_str(): 1, key: "x" })] {
        let worker = json!({"worker_id": "w", "metadata": metadata});
        let answer = replica.post("/v1/agent/workers/register", worker).await;
        assert_invalid(&answer, "metadata");
    }
    let task = json!({"title": "x", "metadata": {"a": {longer: 1, key: "x"}}});
    assert_invalid(&replica.post("/v1/tasks", task).await, "metadata");
    let flat = json!({"worker_id": "w", key: "x"});
    let answer = replica.post("/v1/agent/workers/register", flat).await;
    assert!((400..500).contains(&answer.status), "{answer:?}");
    replica.get("/v1/agent/workers").await.expect(200);
}

#[tokio::test]
async fn e2_results_errors_and_reasons_are_limited_too() {
    let (_db, replica) = start().await;
    replica.register("w", &[], &[]).await;
    let claimed = async || {
        let id = replica.create(json!({"title": "x"})).await;
        replica.claim(&id, "w").await.expect(200);
        id
    };
    let id = claimed().await;
    let result = |bytes: usize| json!({"result": "r".repeat(bytes - 2)});
    let large = replica.finish("complete", &id, "w", result(256 * 1024 + 1)).await;
    assert_invalid(&large, "result");
    let right = result(256 * 1024);
    replica.finish("complete", &id, "w", right.clone()).await.expect(200);
    assert!(replica.task(&id).await["result"] == right["result"]);

    // A stack trace that is too long must not cost the report: it is cut, between characters.
    let id = claimed().await;
    let error = json!({"error": format!("e{}", "é".repeat(40_000)), "retry": false});
    replica.finish("fail", &id, "w", error).await.expect(200);
    let task = replica.task(&id).await;
    assert_eq!(task["error"], format!("e{}", "é".repeat(32_767)));

    let id = claimed().await;
    for (seconds, status) in [(json!(86_401), 422), (json!(-0.1), 422), (json!(86_400), 200)] {
        let body = json!({"retry_after_seconds": seconds});
        assert_eq!(replica.finish("fail", &id, "w", body).await.status, status);
    }
    let cancel = format!("/v1/tasks/{id}/cancel");
    let body = |bytes: usize| json!({"reason": "r".repeat(bytes)});
    assert_invalid(&replica.post(&cancel, body(1001)).await, "reason");
    replica.post(&cancel, body(1000)).await.expect(200);
    assert_eq!(replica.task(&id).await["cancel_reason"], "r".repeat(1000));
}

#[tokio::test]
async fn e2_a_workers_fields_are_stored_unchanged_up_to_their_limits_and_refused_beyond() {
    let (_db, replica) = start().await;
    let ids = |count: usize| (0..count).map(|n| format!("{n:0128}")).collect::<Vec<_>>();
    let metadata = |bytes: usize| json!({"k": "m".repeat(bytes - r#"{"k":""}"#.len())});
    for (field, right, wrong) in [
        ("worker_id", json!("w".repeat(128)), json!("w".repeat(129))),
        ("name", json!("é".repeat(128)), json!("é".repeat(129))),
        ("hostname", json!("é".repeat(255)), json!("é".repeat(256))),
        ("codebases", json!(ids(500)), json!(ids(501))),
        ("capabilities", json!(ids(100)), json!(ids(101))),
        ("metadata", metadata(256 * 1024), metadata(256 * 1024 + 1)),
    ] {
        let path = "/v1/agent/workers/register";
        let wrong = replica.post(path, json!({"name": "n", field: wrong})).await;
        assert_invalid(&wrong, field);
        let worker = replica.post(path, json!({"name": "n", field: right})).await.expect(200);
        let status = format!("/v1/workers/{}/status", worker["worker_id"].as_str().unwrap());
        assert!(replica.get(&status).await.expect(200)[field] == right, "{field}");
    }
    let put = async |codebases: Vec<String>| {
        let body = json!({"worker_id": "w", "codebases": codebases});
        replica.request(replica.http("PUT", "/v1/worker/codebases").json(&body)).await
    };
    replica.register("w", &[], &[]).await;
    assert_invalid(&put(ids(501)).await, "codebases");
    assert_eq!(put(ids(500)).await.expect(200)["codebases"], json!(ids(500)));

    let listed =
        |count| ids(count).iter().map(|id| id[125..].to_owned()).collect::<Vec<_>>().join(",");
    for (name, most) in [("codebases", 500), ("capabilities", 100)] {
        let query = format!("worker_id=s&{name}={}", listed(most));
        drop(replica.stream(&query).await);
        let status = replica.get("/v1/workers/s/status").await.expect(200);
        assert_eq!(status[name].as_array().unwrap().len(), most);
        let path = format!("/v1/worker/tasks/stream?worker_id=s&{name}={}", listed(most + 1));
        let refused = replica.get(&path).await;
        assert_eq!((refused.status, refused.problem().as_str()), (400, "invalid_parameter"));
    }
}

#[tokio::test]
async fn e2_an_idempotency_key_has_one_to_255_bytes() {
    let (_db, replica) = start().await;
    let create = async |key: &str| {
        let request = replica.http("POST", "/v1/tasks").header("Idempotency-Key", key);
        replica.request(request.json(&json!({"title": "x"}))).await
    };
    create(&"k".repeat(255)).await.expect(201);
    for key in [String::new(), "k".repeat(256)] {
        assert_eq!(create(&key).await.problem(), "invalid_parameter");
    }
    let two = replica.http("POST", "/v1/tasks").header("Idempotency-Key", "a");
    let two = two.header("Idempotency-Key", "b").json(&json!({"title": "x"}));
    assert_eq!(replica.request(two).await.problem(), "invalid_parameter");
}

/// JSON with so much white space at its end that it has so many bytes.
fn padded(json: &str, bytes: usize) -> Vec<u8> {
    let mut body = json.as_bytes().to_vec();
    body.resize(bytes, b' ');
    body
}

#[tokio::test]
async fn e2_a_body_may_have_2_mib_and_a_batch_32_and_one_byte_more_is_told_so_whoever_sends_it() {
    let (db, replica) = start().await;
    let sound = Soundness::of(&replica).await;
    replica.register("w", &[], &[]).await;
    let id = replica.create(json!({"title": "x"})).await;
    let json_client = async |method: &str, path: &str, body: Vec<u8>| {
        let request = replica.http(method, path).header("Content-Type", "application/json");
        replica.request(request.body(body)).await
    };
    for (method, path, right, most) in [
        ("POST", "/v1/tasks", r#"{"title":"a"}"#.to_owned(), 2 * MIB),
        ("POST", "/v1/tasks/batch", r#"[{"title":"b"}]"#.to_owned(), 32 * MIB),
        ("POST", "/v1/agent/workers/register", r#"{"worker_id":"w"}"#.to_owned(), 2 * MIB),
        ("PUT", "/v1/worker/codebases", r#"{"worker_id":"w","codebases":[]}"#.to_owned(), 2 * MIB),
        (
            "POST",
            "/v1/worker/tasks/claim",
            format!(r#"{{"worker_id":"w","task_id":"{id}"}}"#),
            2 * MIB,
        ),
        (
            "POST",
            "/v1/worker/tasks/release",
            format!(r#"{{"worker_id":"w","task_id":"{id}","status":"completed"}}"#),
            2 * MIB,
        ),
    ] {
        let before = db.value("select count(*) from tasks").await;
        let body = padded(&right, most + 1);
        // A client that only reads when it has sent all of it must hear the answer too.
        let answer = json_client(method, path, body.clone()).await;
        assert_eq!((answer.status, answer.problem().as_str()), (413, "too_large"), "{path}");
        assert_eq!(answer.json()["bytes_max"], most);
        // Without a length that says so before.
        let head = format!(
            "{method} {path} HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n",
            most + 1
        );
        let chunked = [head.as_bytes(), &body, b"\r\n0\r\n\r\n"].concat();
        let answer = exchange(&replica, &chunked).await.expect("an answer");
        assert_eq!((answer.status, answer.problem().as_str()), (413, "too_large"), "{path}");
        assert_eq!(db.value("select count(*) from tasks").await, before);

        let answer = json_client(method, path, padded(&right, most)).await;
        assert!((200..300).contains(&answer.status), "{path}: {answer:?}");
    }
    let huge = format!(
        "POST /v1/tasks HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        u64::MAX / 4
    );
    let answer = exchange(&replica, huge.as_bytes()).await.expect("an answer");
    assert_eq!(answer.problem(), "too_large");
    sound.holds(&replica).await;
}

#[tokio::test]
async fn e2_a_batch_has_1_to_10_000_tasks_and_one_bad_task_is_named_and_stops_all() {
    let (db, replica) = start().await;
    let batch = async |tasks: Vec<Value>| replica.post("/v1/tasks/batch", json!(tasks)).await;
    let count = async || db.value("select count(*) from tasks").await;
    for wrong in [0, 10_001] {
        assert_invalid(&batch(vec![json!({"title": "x"}); wrong]).await, "tasks");
    }
    let mut tasks = vec![json!({"title": "x"}); 1_000];
    for (bad, reason) in [
        (json!({"title": ""}), "title"),
        (json!({"title": "\0"}), "U+0000"),
        (json!({"title": "x", "tile": 1}), "tile"),
        (json!({}), "title"),
        (json!(null), "object"),
        (json!(["x"]), "object"),
        (json!("x"), "object"),
    ] {
        tasks[711] = bad;
        let answer = batch(tasks.clone()).await;
        assert_eq!((answer.status, answer.problem().as_str()), (422, "invalid_batch"));
        let errors = answer.json()["errors"].clone();
        assert_eq!((errors.as_array().unwrap().len(), &errors[0]["index"]), (1, &json!(711)));
        assert!(errors[0]["detail"].as_str().unwrap().contains(reason), "{errors}");
        assert_eq!(count().await, "0");
    }
    // Of very many bad ones the first hundred are named, and all are counted.
    let answer = batch(vec![json!({}); 150]).await.json();
    assert_eq!(answer["errors"].as_array().unwrap().len(), 100);
    assert!(answer["detail"].as_str().unwrap().starts_with("150 "));
    let tasks = vec![json!({"title": "x"}); 10_000];
    assert_eq!(batch(tasks).await.expect(201)["count"], 10_000);
    assert_eq!(count().await, "10000");
}
