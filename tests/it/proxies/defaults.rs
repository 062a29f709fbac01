//! Proxies as they come: nobody has thought about streams (F45), or everything is compressed (F48).

use std::time::{Duration, Instant};

use serde_json::json;

use super::Proxied;
use super::configs::Setup;
use super::process::Kind;
use super::stream::RawStream;

/// The promise P12: the first event, and each further one.
const SOON: Duration = Duration::from_secs(1);

/// Every event leaves at once, whatever a client says that it accepts; claims name the worker by
/// `?worker_id=`.
async fn pushes_at_once(kind: Kind, setup: Setup) -> Option<Proxied> {
    let behind = Proxied::start(kind, setup, &["--worker-sse-keepalive", "1"]).await?;
    let begun = Instant::now();
    let accept = "Accept-Encoding: gzip, deflate\r\n";
    let mut stream = behind.stream("worker_id=w", accept).await;
    let first = stream.read_within(SOON).await.expect("connected, at once");
    assert_eq!(first.data["worker_id"], "w");
    let opened = begun.elapsed();
    let mut slowest = Duration::ZERO;
    for n in 0..20 {
        let created = Instant::now();
        let task = behind.create(json!({"title": format!("t{n}")})).await;
        assert_eq!(stream.expect("task_available").await.task(), task);
        stream.expect("task").await;
        slowest = slowest.max(created.elapsed());
        behind.claim_and_complete(&task, "w").await;
    }
    for _ in 0..3 {
        let event = stream.read_within(2 * SOON).await.expect("a keepalive each second");
        assert_eq!(event.name, "keepalive");
    }
    eprintln!(
        "{kind:?} {setup:?}: connected after {opened:?}, created to heard {slowest:?} at most of 20, compressed: {}",
        stream.is_compressed()
    );
    assert!(opened < SOON && slowest < SOON, "{opened:?} {slowest:?}");
    expect_stream_compressed(&stream, kind, setup);
    Some(behind)
}

/// nginx compresses whatever it is told to, and flushes each event. HAProxy obeys `no-transform`.
fn expect_stream_compressed(stream: &RawStream, kind: Kind, setup: Setup) {
    let is_expected = (kind, setup) == (Kind::Nginx, Setup::Compressing);
    assert_eq!(stream.is_compressed(), is_expected, "{}", stream.head);
}

#[tokio::test]
async fn nginx_as_it_comes_passes_each_event_at_once_and_who_needs_a_name_is_told_so() {
    let Some(behind) = pushes_at_once(Kind::Nginx, Setup::Defaults).await else { return };
    // nginx dropped the header: the worker is given a name, and told which.
    let mut stream = behind.stream("", "worker_id: under_score\r\n").await;
    let connected = stream.expect("connected").await;
    let given = connected.data["worker_id"].as_str().expect("an id");
    assert_ne!(given, "under_score");
    // A claim without a name names the cause.
    let task = behind.create(json!({"title": "x"})).await;
    let url = format!("{}/v1/tasks/{task}/claim", behind.proxy.url);
    let refused = behind.http.post(url).header("worker_id", "under_score").send().await.unwrap();
    assert_eq!(refused.status(), 400);
    let text = refused.text().await.unwrap();
    assert!(text.contains("worker_id_missing") && text.contains("underscore"), "{text}");
    behind.claim_and_complete(&task, given).await;
}

#[tokio::test]
async fn haproxy_as_it_comes_passes_each_event_at_once_and_the_header_with_an_underscore() {
    let Some(behind) = pushes_at_once(Kind::Haproxy, Setup::Defaults).await else { return };
    let mut stream = behind.stream("", "worker_id: under_score\r\n").await;
    assert_eq!(stream.expect("connected").await.data["worker_id"], "under_score");
}

#[tokio::test]
async fn nginx_that_compresses_everything_still_passes_each_event_at_once() {
    pushes_at_once(Kind::Nginx, Setup::Compressing).await;
}

#[tokio::test]
async fn haproxy_that_compresses_everything_leaves_streams_alone() {
    let Some(behind) = pushes_at_once(Kind::Haproxy, Setup::Compressing).await else { return };
    // It does compress: an answer that is no stream.
    let task = behind.create(json!({"title": "x", "prompt": "y".repeat(10_000)})).await;
    let request = behind.http.get(format!("{}/v1/tasks/{task}", behind.proxy.url));
    let answer = request.header("Accept-Encoding", "gzip").send().await.unwrap();
    assert_eq!(answer.headers()["content-encoding"], "gzip");
}
