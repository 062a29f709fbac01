//! S8: a reader that is stuck although its connection lives, as a stream over HTTP/2 may be.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::raw::connect;
use crate::support::{Replica, TestDb};

/// The server gives a stuck reader 20 s, and looks every second.
const STUCK_LIMIT: Duration = Duration::from_secs(20);

/// One frame of HTTP/2 (RFC 9113).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header as HPACK writes one that it has no short form for (RFC 7541, 6.2.2).
fn header(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    [vec![0], text(name), text(value)].concat()
}

/// Opens a stream whose window takes 300 bytes and no more.
async fn open(replica: &Replica, path: &str) -> TcpStream {
    let mut socket = connect(replica).await;
    let window = [&[0, 4][..], &300_u32.to_be_bytes()].concat();
    let headers = [
        header(":method", "GET"),
        header(":scheme", "http"),
        header(":authority", "x"),
        header(":path", path),
    ];
    let bytes = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &window),
        frame(1, 4 | 1, 1, &headers.concat()),
    ];
    socket.write_all(&bytes.concat()).await.unwrap();
    socket
}

/// Reads whatever comes and answers settings and pings: the connection lives, however stuck its stream.
async fn keep_alive(mut socket: TcpStream) {
    loop {
        let mut head = [0; 9];
        if socket.read_exact(&mut head).await.is_err() {
            return;
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        if socket.read_exact(&mut payload).await.is_err() {
            return;
        }
        let answer = match (head[3], head[4] & 1) {
            (4, 0) => frame(4, 1, 0, &[]),
            (6, 0) => frame(6, 1, 0, &payload),
            _ => continue,
        };
        if socket.write_all(&answer).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn s8_a_stream_over_http2_that_takes_nothing_ends_and_its_worker_is_not_connected_any_more() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let socket = open(&replica, "/v1/worker/tasks/stream?worker_id=stuck").await;
    let alive = tokio::spawn(keep_alive(socket));
    let mut reader = replica.stream("worker_id=reader&events=task_available").await;
    let is_connected = async || {
        let connected = replica.get("/v1/workers/connected").await.expect(200);
        connected.as_array().unwrap().iter().any(|worker| worker["worker_id"] == "stuck")
    };
    crate::support::eventually("it is connected", async || is_connected().await.then_some(()))
        .await;

    for n in 0..4 {
        let id = replica.create(json!({"title": format!("{n}")})).await;
        assert_eq!(reader.announced().await, id);
    }
    let begun = Instant::now();
    while is_connected().await {
        assert!(begun.elapsed() < STUCK_LIMIT + Duration::from_secs(8), "it is still connected");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let took = begun.elapsed();
    assert!(took > STUCK_LIMIT.mul_f32(0.9), "too soon for a slow network: {took:?}");
    let metrics = replica.get("/metrics").await.text;
    assert!(metrics.contains("taskwire_streams_ended_total{outcome=\"too_slow\"} 1"), "{metrics}");
    // The others go on.
    let id = replica.create(json!({"title": "last"})).await;
    assert_eq!(reader.announced().await, id);
    alive.abort();
}
