//! What happens at the sockets: peers that take nothing or vanish, limits of descriptors, and the three
//! kinds of HTTP that a stream can be asked for in.

use std::process::Command;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::raw::{connect, exchange, json_request, request};
use crate::support::{PATIENCE, Replica, TestDb, eventually, programs};

/// A peer that takes nothing is given up after 20 s, one that says nothing after 25 s.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(30);

/// Asks for a stream and reads until its first event is there.
async fn raw_stream(mut socket: TcpStream, worker: &str, version: &str) -> (TcpStream, String) {
    let ask = format!(
        "GET /v1/worker/tasks/stream?worker_id={worker} HTTP/{version}\r\nHost: test\r\n\r\n"
    );
    socket.write_all(ask.as_bytes()).await.unwrap();
    let mut text = String::new();
    read_until(&mut socket, &mut text, "event: connected").await;
    (socket, text)
}

async fn read_until(socket: &mut TcpStream, text: &mut String, what: &str) {
    while !text.contains(what) {
        let mut bytes = [0; 4096];
        let count = timeout(PATIENCE, socket.read(&mut bytes)).await.unwrap().unwrap();
        assert!(count > 0, "it ended: {text}");
        text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
    }
}

async fn connected(replica: &Replica) -> String {
    let answer = replica.get("/v1/workers/connected").await.expect(200);
    let streams = answer.as_array().unwrap().iter().filter(|w| !w["connected_at"].is_null());
    let mut ids: Vec<_> = streams.map(|w| w["worker_id"].as_str().unwrap().to_owned()).collect();
    ids.sort();
    ids.join(" ")
}

#[tokio::test]
async fn s8_f35_a_peer_whose_socket_is_full_is_closed_and_the_others_hear_everything() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    // A window of about 2 KiB: what is on its way to a worker fits into no such socket.
    socket.set_recv_buffer_size(4096).unwrap();
    let address: std::net::SocketAddr =
        replica.url.strip_prefix("http://").unwrap().parse().unwrap();
    socket.connect(&address.into()).unwrap();
    socket.set_nonblocking(true).unwrap();
    let stuck = TcpStream::from_std(socket.into()).unwrap();
    let (stuck, _) = raw_stream(stuck, "stuck", "1.1").await;
    let mut reader = replica.stream("worker_id=reader&events=task_available").await;
    let prompt = "x".repeat(8_000);
    let begun = Instant::now();
    for n in 0..8 {
        let id = replica.create(json!({"title": format!("{n}"), "prompt": prompt})).await;
        assert_eq!(reader.announced().await, id);
    }
    let mut left = String::from("reader stuck");
    while left != "reader" {
        assert!(begun.elapsed() < GIVEN_UP_WITHIN, "after {:?}: {left}", begun.elapsed());
        let id = replica.create(json!({"title": "more", "target_worker_id": "reader"})).await;
        assert_eq!(reader.announced().await, id);
        replica.claim(&id, "reader").await.expect(200);
        left = connected(&replica).await;
    }
    let metrics = replica.get("/metrics").await.text;
    assert!(metrics.contains("streams_ended_total{outcome=\"too_slow\"} 1"), "{metrics}");
    drop(stuck);
}

/// Nothing that its peer sends arrives any more, as when a cable is pulled. Undone when dropped.
struct Unplugged(String);

impl Unplugged {
    fn the_client_at(port: u16) -> Option<Self> {
        programs::find("nft")?;
        let table = format!("taskwire_test_{}_{port}", std::process::id());
        let rules = format!(
            "table inet {table} {{ chain in {{ type filter hook input priority 0; \
             tcp sport {port} drop; tcp dport {port} drop; }}; }};"
        );
        let done = Command::new("nft").arg(&rules).output().expect("nft runs");
        if !done.status.success() {
            programs::skip(&format!("may not use nft: {}", String::from_utf8_lossy(&done.stderr)));
            return None;
        }
        Some(Self(table))
    }
}

impl Drop for Unplugged {
    fn drop(&mut self) {
        let _ = Command::new("nft").args(["delete", "table", "inet", &self.0]).status();
    }
}

#[tokio::test]
async fn f34_a_worker_that_vanishes_is_noticed_within_thirty_seconds_idle_or_not() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut sockets = Vec::new();
    let mut unplugged = Vec::new();
    for worker in ["idle", "busy"] {
        let (socket, _) = raw_stream(connect(&replica).await, worker, "1.1").await;
        let Some(cut) = Unplugged::the_client_at(socket.local_addr().unwrap().port()) else {
            return;
        };
        unplugged.push(cut);
        sockets.push(socket);
    }
    let begun = Instant::now();
    replica.create(json!({"title": "x", "target_worker_id": "busy"})).await;
    while !connected(&replica).await.is_empty() {
        assert!(begun.elapsed() < GIVEN_UP_WITHIN, "{}", connected(&replica).await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Starts a replica that may open so many files.
async fn replica_with_files(db: &TestDb, files: usize) -> Replica {
    let mut command = Command::new("prlimit");
    command
        .arg(format!("--nofile={files}:{files}"))
        .args([env!("CARGO_BIN_EXE_taskwire"), "serve", "--bind", "127.0.0.1:0"])
        .args(["--database-url", &db.url, "--drain-seconds", "1"]);
    Replica::spawn(command).await
}

#[tokio::test]
async fn f30_streams_never_starve_requests_and_who_finds_no_room_is_told_so() {
    let db = TestDb::new().await;
    let replica = replica_with_files(&db, 200).await;
    assert!(
        replica.log().contains("room for 150 connections, 132 of them streams"),
        "{}",
        replica.log()
    );
    let mut streams = Vec::new();
    for n in 0..132 {
        let (socket, _) = raw_stream(connect(&replica).await, &format!("w-{n}"), "1.1").await;
        streams.push(socket);
    }
    let refused = replica.get("/v1/worker/tasks/stream?worker_id=late").await;
    assert_eq!((refused.status, refused.problem().as_str()), (503, "too_many_streams"));
    assert!(refused.headers.contains_key("retry-after"));

    // The rest of the room goes to connections that ask for nothing.
    let mut idle = Vec::new();
    let refused = loop {
        assert!(idle.len() < 150, "no end");
        let Some(answer) = exchange(&replica, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await
        else {
            continue;
        };
        if answer.status == 503 {
            break answer;
        }
        idle.push(connect(&replica).await);
    };
    assert_eq!(refused.problem(), "too_many_connections");
    // Those that say nothing lose their place within 2 s when room is short.
    let begun = Instant::now();
    eventually("somebody is served again", async || {
        let answer = exchange(&replica, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        answer.filter(|answer| answer.status == 200)
    })
    .await;
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    // And all the streams are open still.
    let id = replica.create(json!({"title": "x"})).await;
    for socket in &mut streams {
        read_until(socket, &mut String::new(), &id).await;
    }
}

#[tokio::test]
async fn f30_out_of_descriptors_it_refuses_at_once_and_keeps_its_streams() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut streams = Vec::new();
    for n in 0..60 {
        let (socket, _) = raw_stream(connect(&replica).await, &format!("w-{n}"), "1.1").await;
        streams.push(socket);
    }
    let limit = |files: &str| {
        let pid = replica.pid().to_string();
        let done =
            Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={files}")]).status();
        assert!(done.unwrap().success());
    };
    // Fewer than it has open: each further accept fails.
    limit("50:20000");
    for _ in 0..50 {
        let begun = Instant::now();
        let mut socket = connect(&replica).await;
        let _ = socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        let mut text = String::new();
        let _ = timeout(PATIENCE, socket.read_to_string(&mut text)).await.expect("it is closed");
        assert!(text.is_empty() || text.contains("too_many_connections"), "{text}");
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
    db.execute("insert into tasks (title) values ('x')").await;
    for socket in &mut streams {
        read_until(socket, &mut String::new(), "task_available").await;
    }
    limit("20000:20000");
    // The next one may still be refused, before it has asked.
    eventually("it serves again", async || {
        let answer = exchange(&replica, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        answer.filter(|answer| answer.status == 200)
    })
    .await;
    assert!(!replica.log().contains("panicked"));
}

#[tokio::test]
async fn an_http_1_0_client_reads_its_stream_to_the_end_of_the_connection() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let (mut socket, mut text) = raw_stream(connect(&replica).await, "old", "1.0").await;
    assert!(!text.to_lowercase().contains("transfer-encoding"), "{text}");
    let id = replica.create(json!({"title": "x"})).await;
    read_until(&mut socket, &mut text, &id).await;
    // The farewell ends the stream.
    replica.post("/v1/agent/workers/old/unregister", json!({})).await.expect(200);
    let _ = timeout(PATIENCE, socket.read_to_string(&mut text)).await.unwrap().unwrap();
    assert!(text.contains(&id) && text.trim_end().ends_with("\"reconnect\":false}"), "{text}");
}

#[tokio::test]
async fn a_stream_over_http_1_1_is_whole_chunks_to_its_last() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let (mut socket, mut text) = raw_stream(connect(&replica).await, "w", "1.1").await;
    let id = replica.create(json!({"title": "x"})).await;
    read_until(&mut socket, &mut text, &id).await;
    replica.post("/v1/agent/workers/w/unregister", json!({})).await.expect(200);
    let _ = timeout(PATIENCE, socket.read_to_string(&mut text)).await.unwrap().unwrap();
    let (head, mut body) = text.split_once("\r\n\r\n").unwrap();
    for field in
        ["content-type: text/event-stream", "x-accel-buffering: no", "date: ", "connection: close"]
    {
        assert!(head.contains(field), "{field} in {head}");
    }
    let mut events = String::new();
    loop {
        let (length, rest) = body.split_once("\r\n").unwrap();
        let length = usize::from_str_radix(length, 16).unwrap();
        events.push_str(&rest[..length]);
        body = rest[length..].strip_prefix("\r\n").unwrap();
        if length == 0 {
            break;
        }
    }
    assert_eq!(body, "");
    assert!(events.contains(&id) && events.ends_with("\"reconnect\":false}\n\n"), "{events}");
}

#[tokio::test]
async fn a_stream_asked_for_behind_another_request_comes_after_its_answer() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut socket = connect(&replica).await;
    socket
        .write_all(
            b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n\
              GET /v1/worker/tasks/stream?worker_id=w HTTP/1.1\r\nHost: x\r\n\r\n",
        )
        .await
        .unwrap();
    let mut text = String::new();
    read_until(&mut socket, &mut text, "event: connected").await;
    let at = |what: &str| text.find(what).unwrap();
    assert!(at("\"status\":\"ok\"") < at("text/event-stream"), "{text}");
}

#[tokio::test]
async fn a_stream_over_http_2_without_tls_is_pushed_and_ended_like_any() {
    if programs::find("curl").is_none() {
        return;
    }
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let url = format!("{}/v1/worker/tasks/stream?worker_id=h2", replica.url);
    let curl = Command::new("curl")
        .args(["-sN", "--http2-prior-knowledge", "--max-time", "20", "-w", "%{http_version}", &url])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    eventually("it is connected", async || (connected(&replica).await == "h2").then_some(())).await;
    let id = replica.create(json!({"title": "x"})).await;
    eventually("it was told", async || {
        let metrics = replica.get("/metrics").await.text;
        metrics.contains("announcements_total 1\n").then_some(())
    })
    .await;
    replica.post("/v1/agent/workers/h2/unregister", json!({})).await.expect(200);
    let output =
        tokio::task::spawn_blocking(move || curl.wait_with_output()).await.unwrap().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(&id) && text.contains("unregistered") && text.ends_with('2'), "{text}");
}

#[tokio::test]
async fn p16_bodies_that_stop_arriving_hold_up_nobody_and_are_given_up_after_ten_seconds() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let begun = Instant::now();
    let batch = json_request("POST", "/v1/tasks/batch", br#"[{"title":"slow"}]"#);
    let slow = (0..40).map(async |n: usize| {
        let mut socket = connect(&replica).await;
        socket.write_all(&batch[..batch.len() - 1 - n % 5]).await.unwrap();
        let mut text = String::new();
        timeout(PATIENCE, socket.read_to_string(&mut text)).await.expect("an end").unwrap();
        (begun.elapsed(), text)
    });
    let honest = async {
        for _ in 0..20 {
            let body = json!([{"title": "honest"}]);
            replica.post("/v1/tasks/batch", body).await.expect(201);
        }
        begun.elapsed()
    };
    let (slow, honest) = tokio::join!(join_all(slow), honest);
    assert!(honest < Duration::from_secs(5), "{honest:?}");
    for (after, text) in slow {
        assert!(
            text.starts_with("HTTP/1.1 408") && text.contains("\"code\":\"too_slow\""),
            "{text}"
        );
        assert!((9..14).contains(&after.as_secs()), "{after:?}");
    }
    assert_eq!(db.value("select count(*) from tasks where title = 'slow'").await, "0");
}

#[tokio::test]
async fn s10_stuck_peers_do_not_hold_up_the_end() {
    let db = TestDb::new().await;
    let mut replica = Replica::start(&db).await;
    let mut sockets = Vec::new();
    for n in 0..20 {
        let (socket, _) = raw_stream(connect(&replica).await, &format!("w-{n}"), "1.1").await;
        SockRef::from(&socket).set_recv_buffer_size(2048).unwrap();
        sockets.push(socket);
        let mut half = connect(&replica).await;
        half.write_all(&request("POST", b"/v1/tasks", &[("X", b"y")], b"{}")[..20]).await.unwrap();
        sockets.push(half);
    }
    for n in 0..8 {
        replica.create(json!({"title": format!("{n}"), "prompt": "x".repeat(12_000)})).await;
    }
    replica.signal("TERM");
    // The drain of 1 s, its grace of 2 s, the farewell of 1 s.
    let ended = replica.ends_within(Duration::from_secs(5)).await;
    assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
}
