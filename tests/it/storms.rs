//! F41: many streams that come back at once.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::raw::connect;
use crate::support::{PATIENCE, Replica, TestDb, eventually};

/// Streams of the small form; a larger one by `TASKWIRE_STORM_STREAMS`.
const STREAMS: usize = 300;
/// As the header of a refusal says.
const RETRY_AFTER: Duration = Duration::from_secs(1);

fn streams() -> usize {
    let set = std::env::var_os("TASKWIRE_STORM_STREAMS").and_then(|text| text.into_string().ok());
    set.map_or(STREAMS, |text| text.parse().expect("TASKWIRE_STORM_STREAMS is a number"))
}

/// Opens a stream and reads until it has heard of a task; as a worker does, again after a refusal.
async fn come_back(replica: &Replica, worker: usize) -> TcpStream {
    loop {
        let mut socket = connect(replica).await;
        let request = format!(
            "GET /v1/worker/tasks/stream?worker_id=w-{worker}&events=task_available&codebases=c HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).await.unwrap();
        if hear(&mut socket, "event: task_available").await {
            return socket;
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// Reads until something comes; false when the stream ended before.
async fn hear(socket: &mut TcpStream, what: &str) -> bool {
    let mut text = String::new();
    while !text.contains(what) {
        let mut bytes = [0; 4096];
        let count = timeout(3 * PATIENCE, socket.read(&mut bytes)).await.expect(what).unwrap();
        if count == 0 {
            assert!(text.starts_with("HTTP/1.1 503"), "the stream ended: {text}");
            return false;
        }
        text.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    true
}

async fn backlog_reads(replica: &Replica) -> u64 {
    let metrics = replica.get("/metrics").await.text;
    let line = metrics.lines().find_map(|l| l.strip_prefix("taskwire_backlog_reads_total "));
    line.map_or(0, |count| count.parse().expect("a count"))
}

#[tokio::test]
async fn f41_streams_that_come_back_at_once_share_their_backlog_and_leave_postgres_to_claims() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    db.execute(
        "insert into tasks (title, codebase_id) select 'x', 'c' from generate_series(1, 1000)",
    )
    .await;
    // What is for one worker alone reaches it all the same.
    let own = json!({"title": "own", "codebase_id": "c", "target_worker_id": "w-7", "priority": 1});
    let own = replica.create(own).await;
    replica.register("claimer", &[], &[]).await;
    for n in 0..100 {
        replica.create(json!({"title": format!("claim {n}"), "target_worker_id": "claimer"})).await;
    }
    let ids = db
        .value("select string_agg(id::text, ' ') from tasks where target_worker_id = 'claimer'")
        .await;

    let before = backlog_reads(&replica).await;
    let begun = Instant::now();
    let storm = join_all((0..streams()).map(|n| come_back(&replica, n)));
    let claims = async {
        let mut took = Vec::new();
        for id in ids.split(' ') {
            let begun = Instant::now();
            // On a machine that is busy besides, a claim may be told to come back: that counts as slow.
            while replica.claim(id, "claimer").await.status == 503 {
                tokio::time::sleep(RETRY_AFTER).await;
            }
            took.push(begun.elapsed());
        }
        took.sort();
        took
    };
    let (mut sockets, took) = tokio::join!(storm, claims);
    let (all_after, reads) = (begun.elapsed(), backlog_reads(&replica).await - before);
    let rounds_max = streams() as u64 / 4;
    eprintln!(
        "{} streams heard of their backlog after {all_after:?}, by {reads} statements; claims p50 {:?}, p99 {:?}",
        streams(),
        took[50],
        took[99]
    );
    assert!(reads <= rounds_max, "{reads} statements for {} streams", streams());

    // After a loss all of them are looked at again, together.
    let before = backlog_reads(&replica).await;
    db.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity
          where application_name = 'taskwire listener' and datname = current_database()",
    )
    .await;
    let news = json!({"title": "news", "codebase_id": "c", "priority": 9});
    let news = replica.create(news).await;
    for socket in &mut sockets {
        assert!(hear(socket, &news).await);
    }
    eventually("the backlogs were read again", async || {
        (backlog_reads(&replica).await > before).then_some(())
    })
    .await;
    let reads = backlog_reads(&replica).await - before;
    assert!(reads <= rounds_max, "{reads} statements for {} streams", streams());
    drop(sockets);
    let mut stream = replica.stream("worker_id=w-7&events=task_available&codebases=c").await;
    let heard = stream.announced_many(2).await;
    assert_eq!(heard, [news, own]);
}
