//! E1, F38, F39: peers that speak no proper HTTP, or stop in the middle of it.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::raw::{Soundness, connect, exchange, json_request};
use crate::support::{Replica, TestDb, eventually};

/// The server gives a request's head 10 s.
const HEAD_LIMIT: Duration = Duration::from_secs(10);

#[tokio::test]
async fn garbage_instead_of_a_request_is_refused_at_once() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let sound = Soundness::of(&replica).await;
    let long_target = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(70_000));
    let large_head = format!("GET /healthz HTTP/1.1\r\nX-A: {}\r\n\r\n", "a".repeat(1024 * 1024));
    let many_heads = format!("GET /healthz HTTP/1.1\r\n{}\r\n", "X-A: a\r\n".repeat(1_000));
    for (status, bytes) in [
        (400, &b"\x00\x01\x02garbage\r\n\r\n"[..]),
        (400, b"\r\n\r\nGET\r\n\r\n"),
        (400, b"GET /healthz\r\n\r\n"),
        (400, b"GET /healthz HTTP/9.9\r\n\r\n"),
        (400, b"GET /healthz HTTP/1.1\r\nno colon\r\n\r\n"),
        (400, b"GET /healthz HTTP/1.1\r\nX-A: a\r\n folded\r\n\r\n"),
        (400, b"GET /healthz HTTP/1.1\r\nX-A: a\0b\r\n\r\n"),
        (400, b"GET /healthz HTTP/1.1\r\nX A: a\r\n\r\n"),
        (400, b"GET /v1/tasks/\xff\xfe HTTP/1.1\r\n\r\n"),
        (400, b"GET /a b HTTP/1.1\r\n\r\n"),
        (400, b"POST /v1/tasks HTTP/1.1\r\nContent-Length: -1\r\n\r\n"),
        (400, b"POST /v1/tasks HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
        (400, b"POST /v1/tasks HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n"),
        (
            400,
            b"POST /v1/tasks HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ),
        (404, b"CONNECT 127.0.0.1:80 HTTP/1.1\r\n\r\n"),
        (404, b"OPTIONS * HTTP/1.1\r\n\r\n"),
        (414, long_target.as_bytes()),
        (431, large_head.as_bytes()),
        (431, many_heads.as_bytes()),
    ] {
        let answer = exchange(&replica, bytes).await.expect("an answer");
        let about = String::from_utf8_lossy(&bytes[..bytes.len().min(100)]);
        assert_eq!(answer.status, status, "{about:?}: {answer:?}");
    }
    sound.holds(&replica).await;
}

#[tokio::test]
async fn p16_who_does_not_finish_a_requests_head_is_cut_off_after_ten_seconds() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let begun = Instant::now();
    let beginnings: [&[u8]; 6] = [
        b"",
        b"P",
        b"PRI * HTTP/2.0\r\n",
        b"GET /healthz HTTP/1.1\r\nX-A: ",
        b"GET /healthz HTTP/1.1\r\n\r\nGET /healthz HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ];
    let ends = join_all(beginnings.map(async |beginning| {
        let mut socket = connect(&replica).await;
        socket.write_all(beginning).await.unwrap();
        let mut rest = Vec::new();
        let limit = HEAD_LIMIT + Duration::from_secs(3);
        let closed = tokio::time::timeout(limit, socket.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "still open: {:?}", String::from_utf8_lossy(beginning));
        begun.elapsed()
    }))
    .await;
    let soonest = *ends.iter().min().unwrap();
    assert!(soonest > HEAD_LIMIT.mul_f32(0.9), "too soon for a slow network: {soonest:?}");
    replica.get("/healthz").await.expect(200);
}

#[tokio::test]
async fn f38_a_body_that_ends_before_its_length_does_nothing() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let sound = Soundness::of(&replica).await;
    // What has arrived is valid JSON: only the length says that it is not all.
    for path in ["/v1/tasks", "/v1/tasks/batch"] {
        let body = if path.ends_with("batch") { r#"[{"title":"x"}]"# } else { r#"{"title":"x"}"# };
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len() + 1
        );
        let mut socket = connect(&replica).await;
        socket.write_all([head.as_bytes(), body.as_bytes()].concat().as_slice()).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = String::new();
        let _ = socket.read_to_string(&mut answer).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    assert_eq!(db.value("select count(*) from tasks").await, "0");
    sound.holds(&replica).await;
}

#[tokio::test]
async fn f39_clients_that_hang_up_in_the_middle_leave_no_transaction_and_a_whole_pool() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let sound = Soundness::of(&replica).await;
    replica.register("w", &[], &[]).await;
    let mut tasks = Vec::new();
    for n in 0..100 {
        tasks.push(replica.create(json!({"title": format!("{n}")})).await);
    }
    let hang_up = async |n: usize| {
        let task = &tasks[n % tasks.len()];
        let bytes = match n % 5 {
            0 => json_request("POST", "/v1/tasks", br#"{"title":"by one who left"}"#),
            1 => json_request("POST", &format!("/v1/tasks/{task}/claim?worker_id=w"), b""),
            2 => json_request("GET", "/v1/tasks", b""),
            3 => json_request("GET", &format!("/v1/worker/tasks/stream?worker_id=s-{n}"), b""),
            _ => json_request("POST", "/v1/tasks/batch", br#"[{"title":"a"},{"title":"b"}]"#),
        };
        let mut socket = connect(&replica).await;
        // Each leaves a little later in the request, or in its answer.
        let cut = if n.is_multiple_of(3) { bytes.len() * (n % 50) / 50 } else { bytes.len() };
        let _ = socket.write_all(&bytes[..cut]).await;
        for _ in 0..n % 40 {
            tokio::task::yield_now().await;
        }
        if n.is_multiple_of(2) {
            // With a reset instead of a farewell.
            socket.set_zero_linger().unwrap();
        }
    };
    for round in 0..20 {
        join_all((0..30).map(|n| hang_up(round * 30 + n))).await;
    }
    let sessions = "from pg_stat_activity where datname = current_database()
                     and application_name like 'taskwire%'";
    let stuck = format!(
        "select count(*) {sessions} and state like 'idle in transaction%' and now() - state_change > interval '500 ms'"
    );
    assert_eq!(db.value(&stuck).await, "0");
    eventually("every session is idle again", async || {
        let busy = format!("select count(*) {sessions} and state <> 'idle'");
        (db.value(&busy).await == "0").then_some(())
    })
    .await;
    eventually("nobody who left is connected", async || {
        (db.value("select count(*) from streams").await == "0").then_some(())
    })
    .await;
    // More requests at once than the pool has connections: each gets its answer.
    let answers = join_all((0..64).map(|_| replica.get("/v1/tasks?limit=1"))).await;
    assert!(answers.iter().all(|answer| answer.status == 200));
    // A claim either happened whole or not at all.
    let half = "select count(*) from tasks where (status = 'running') <> (claimed_by is not null)";
    assert_eq!(db.value(half).await, "0");
    sound.holds(&replica).await;
}
