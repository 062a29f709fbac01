//! The configurations in `deploy`, as they are.

use std::fmt::Write;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::time::sleep;

use super::Proxied;
use super::configs::Setup;
use super::process::Kind;
use crate::support::eventually;

/// The promise P12: the first event, and each further one.
const SOON: Duration = Duration::from_secs(1);
/// Longer than the shortest of the timeouts that proxies have by default (nginx: 60 s).
const LONG_SILENCE: Duration = Duration::from_secs(75);

/// A worker that names itself by the header `worker_id` is known, hears of a task at once, hears
/// keepalives, and its claim and completion pass.
async fn pushes_at_once(kind: Kind) {
    let flags = ["--worker-sse-keepalive", "1"];
    let Some(behind) = Proxied::start(kind, Setup::Shipped, &flags).await else { return };
    let begun = Instant::now();
    let mut stream = behind.stream("", "worker_id: under_score\r\nX-Codebases: a,b\r\n").await;
    let first = stream.read_within(SOON).await.expect("connected, at once");
    assert_eq!(first.name, "connected");
    assert_eq!(first.data["worker_id"], "under_score");
    let opened = begun.elapsed();
    assert!(stream.head.contains("text/event-stream"), "{}", stream.head);
    let mut slowest = Duration::ZERO;
    for n in 0..20 {
        let created = Instant::now();
        let task = behind.create(json!({"title": format!("t{n}"), "codebase_id": "b"})).await;
        let event = stream.expect("task_available").await;
        assert_eq!(event.task(), task);
        stream.expect("task").await;
        slowest = slowest.max(created.elapsed());
        behind.claim_and_complete(&task, "under_score").await;
    }
    eprintln!(
        "{kind:?} as shipped: connected after {opened:?}, created to heard {slowest:?} at most of 20"
    );
    assert!(opened < SOON && slowest < SOON, "{opened:?} {slowest:?}");
    for _ in 0..3 {
        let event = stream.read_within(2 * SOON).await.expect("a keepalive each second");
        assert_eq!(event.name, "keepalive");
    }
    let connected = behind.get("/v1/workers/connected").await.expect(200);
    assert_eq!(connected[0]["worker_id"], "under_score");
}

#[tokio::test]
async fn proxies_as_shipped_pass_each_event_at_once_and_the_header_with_an_underscore() {
    tokio::join!(pushes_at_once(Kind::Nginx), pushes_at_once(Kind::Haproxy));
}

/// The longest list of codebases (E2) is one header of 64 KiB.
async fn takes_the_longest_header(kind: Kind) {
    let Some(behind) = Proxied::start(kind, Setup::Shipped, &[]).await else { return };
    let mut codebases = String::new();
    for n in 0..500 {
        let _ = write!(codebases, "{n:0>128},");
    }
    let headers = format!("X-Codebases: {}\r\n", codebases.trim_end_matches(','));
    let mut stream = behind.stream("worker_id=w", &headers).await;
    stream.expect("connected").await;
    let last = format!("{:0>128}", 499);
    let task = behind.create(json!({"title": "x", "codebase_id": last})).await;
    assert_eq!(stream.expect("task_available").await.task(), task);
}

#[tokio::test]
async fn proxies_as_shipped_take_the_longest_list_of_codebases() {
    tokio::join!(takes_the_longest_header(Kind::Nginx), takes_the_longest_header(Kind::Haproxy));
}

/// Nothing is sent to it that could show that it is gone: the proxy has to say so.
async fn notices_who_hangs_up(kind: Kind) {
    let Some(behind) = Proxied::start(kind, Setup::Shipped, &[]).await else { return };
    let mut stream = behind.stream("worker_id=w", "").await;
    stream.expect("connected").await;
    assert_eq!(behind.db.value("select count(*) from streams").await, "1");
    drop(stream);
    let closed = Instant::now();
    eventually("the replica notices", async || {
        (behind.db.value("select count(*) from streams").await == "0").then_some(())
    })
    .await;
    eprintln!("{kind:?}: a worker that hung up was gone after {:?}", closed.elapsed());
}

#[tokio::test]
async fn a_worker_that_hangs_up_behind_a_proxy_is_gone_at_once() {
    tokio::join!(notices_who_hangs_up(Kind::Nginx), notices_who_hangs_up(Kind::Haproxy));
}

/// S8: a worker that executes in its read loop reads nothing while its window fills and keepalives
/// pile up, and afterwards reads all of it.
async fn keeps_who_does_not_read(kind: Kind) {
    let flags = ["--worker-sse-keepalive", "1"];
    let Some(behind) = Proxied::start(kind, Setup::Shipped, &flags).await else { return };
    let mut stream = behind.stream("worker_id=busy", "").await;
    stream.expect("connected").await;
    let prompt = "p".repeat(4_000);
    let tasks: Vec<_> =
        (0..300).map(|n| json!({"title": format!("t{n}"), "prompt": prompt})).collect();
    behind.post("/v1/tasks/batch", json!(tasks)).await.expect(201);
    // Not waiting for a condition: that nobody reads for a while is the point.
    sleep(Duration::from_secs(4)).await;
    for _ in 0..300 {
        let event = stream.expect("task_available").await;
        behind.claim_and_complete(event.task(), "busy").await;
    }
    let open = behind.db.value("select count(*) from attempts where outcome = 'completed'").await;
    assert_eq!(open, "300");
}

#[tokio::test]
async fn a_worker_that_does_not_read_for_a_while_keeps_its_stream_through_a_proxy() {
    tokio::join!(keeps_who_does_not_read(Kind::Nginx), keeps_who_does_not_read(Kind::Haproxy));
}

/// With every default there is: the keepalive of 30 s, nginx's 60 s, HAProxy's 50 s.
async fn outlasts_silence(kind: Kind, setup: Setup) {
    let Some(behind) = Proxied::start(kind, setup, &[]).await else { return };
    let mut stream = behind.stream("worker_id=quiet", "").await;
    stream.expect("connected").await;
    let begun = Instant::now();
    let mut keepalives = 0;
    while begun.elapsed() < LONG_SILENCE {
        let event = stream.read_within(Duration::from_secs(35)).await.expect("a keepalive");
        assert_eq!(event.name, "keepalive");
        keepalives += 1;
    }
    let created = Instant::now();
    let task = behind.create(json!({"title": "x"})).await;
    assert_eq!(stream.expect("task_available").await.task(), task);
    eprintln!(
        "{kind:?} {setup:?}: {keepalives} keepalives in {:?}, then a task after {:?}",
        begun.elapsed(),
        created.elapsed()
    );
}

#[tokio::test]
#[ignore = "takes 90 s of silence: run by hand"]
async fn a_silent_worker_outlasts_every_default_timeout_behind_every_proxy() {
    tokio::join!(
        outlasts_silence(Kind::Nginx, Setup::Shipped),
        outlasts_silence(Kind::Nginx, Setup::Defaults),
        outlasts_silence(Kind::Haproxy, Setup::Shipped),
        outlasts_silence(Kind::Haproxy, Setup::Defaults),
    );
}
