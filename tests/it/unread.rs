//! S8: what is on its way to a worker that does not read always fits into its socket.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::raw::connect;
use crate::support::{PATIENCE, Replica, TestDb};

/// What a worker may not have read, with what is more important than all that is held back (push/unread.rs).
const UNREAD_BYTES_MAX: usize = 48 * 1024;
/// An announcement of the tasks here, and keepalives.
const SLACK_BYTES: usize = 2 * 1024;
/// Nothing comes for so long: there is nothing more on its way.
const QUIET: Duration = Duration::from_millis(1_500);

/// A stream that is read when the test says so.
struct RawStream {
    socket: TcpStream,
    text: String,
    read_bytes: usize,
}

impl RawStream {
    async fn open(replica: &Replica, query: &str) -> Self {
        let mut socket = connect(replica).await;
        let request = format!("GET /v1/worker/tasks/stream?{query} HTTP/1.1\r\nHost: x\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut stream = Self { socket, text: String::new(), read_bytes: 0 };
        stream.until("event: connected").await;
        stream
    }

    /// Reads until a text is there.
    async fn until(&mut self, text: &str) {
        while !self.text.contains(text) {
            assert!(self.read(PATIENCE).await > 0, "the stream ended before {text}: {}", self.text);
        }
    }

    /// Reads what is on its way, until nothing comes; how many bytes that was.
    async fn drain(&mut self) -> usize {
        let before = self.read_bytes;
        self.text.clear();
        while self.read(QUIET).await > 0 {}
        self.read_bytes - before
    }

    async fn read(&mut self, patience: Duration) -> usize {
        let mut bytes = vec![0; 16 * 1024];
        let Ok(count) = timeout(patience, self.socket.read(&mut bytes)).await else { return 0 };
        let count = count.expect("the stream is open");
        assert!(count > 0, "the server ended the stream: {}", self.text);
        self.read_bytes += count;
        self.text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        count
    }

    /// The announced tasks among what was read last.
    fn announced(&self) -> Vec<String> {
        let ids = self.text.lines().filter_map(|line| line.strip_prefix("data: {\"task_id\":\""));
        ids.map(|rest| rest[..36].to_owned()).collect()
    }
}

/// So many tasks, told of to a worker that reads and taken by somebody else, again and again.
async fn pour(db: &TestDb, replica: &Replica, rounds: usize) {
    let mut reader = replica.stream("worker_id=reader&events=task_available").await;
    for round in 0..rounds {
        db.execute(&format!(
            "insert into tasks (title, prompt) select 'round {round}', repeat('x', 400) from generate_series(1, 500)"
        ))
        .await;
        // Who reads hears of this round: so did the other one, if there was room.
        loop {
            let event = reader.expect("task_available").await;
            if event.data["title"] == format!("round {round}").as_str() {
                replica.claim(event.task(), "reader").await;
                break;
            }
        }
        db.execute(
            "update tasks set status = 'running', claimed_by = 'somebody', claimed_at = now(),
                    claim_epoch = claim_epoch + 1, attempt = attempt + 1,
                    lease_expires_at = now() + interval '1 hour'
              where status = 'pending'",
        )
        .await;
    }
}

/// A worker executes its first task and does not read, while tasks come and go.
async fn a_busy_worker_is_not_swamped(calls_elsewhere: bool) {
    let db = TestDb::new().await;
    let own = Replica::start(&db).await;
    let other = if calls_elsewhere { Some(Replica::start(&db).await) } else { None };
    let calls = other.as_ref().unwrap_or(&own);
    calls.register("somebody", &[], &[]).await;
    let mut stream = RawStream::open(&own, "worker_id=busy").await;
    let first = own.create(json!({"title": "first"})).await;
    stream.until(&first).await;
    calls.claim(&first, "busy").await.expect(200);

    pour(&db, &own, 40).await;
    // More important than all that is held back: it is told of.
    let urgent = own.create(json!({"title": "urgent", "priority": 9})).await;
    let best = own.create(json!({"title": "best", "priority": 5})).await;
    let bytes = stream.drain().await;
    let told = stream.announced();
    eprintln!("{bytes} bytes on the way, {} announcements, of 20,000", told.len());
    assert!(bytes <= UNREAD_BYTES_MAX + SLACK_BYTES, "{bytes} bytes were on their way");
    assert!(told.contains(&urgent), "{told:?}");

    // It reads on, and is refused what others have taken: it goes on with the best of what there is.
    let last = told.iter().rfind(|id| **id != urgent && **id != best).unwrap();
    calls.claim(last, "busy").await;
    if !told.contains(&best) {
        stream.until(&best).await;
    }
    calls.claim(&best, "busy").await.expect(200);
    calls.claim(&urgent, "busy").await.expect(200);
    let next = own.create(json!({"title": "next"})).await;
    stream.until(&next).await;
}

#[tokio::test]
async fn s8_a_worker_that_does_not_read_has_no_more_on_its_way_than_a_socket_holds() {
    a_busy_worker_is_not_swamped(false).await;
}

#[tokio::test]
async fn s8_the_same_holds_for_a_worker_whose_calls_land_on_another_replica() {
    a_busy_worker_is_not_swamped(true).await;
}

#[tokio::test]
async fn s8_a_worker_whose_calls_land_elsewhere_is_told_as_fast_as_it_wins() {
    let db = TestDb::new().await;
    let (own, other) = (Replica::start(&db).await, Replica::start(&db).await);
    let mut stream = own.stream("worker_id=w").await;
    db.execute("insert into tasks (title, prompt) select 'x', repeat('x', 400) from generate_series(1, 600)").await;
    let begun = Instant::now();
    for _ in 0..600 {
        let id = stream.announced().await;
        other.claim(&id, "w").await.expect(200);
    }
    let rate = 600.0 / begun.elapsed().as_secs_f64();
    eprintln!("{rate:.0} tasks/s told and won");
    // A hundred on an idle machine. Without any proof it would hear of forty and of no more.
    assert!(rate > 5.0, "{rate:.0} tasks/s");
}

/// A worker that is woken by its stream and then takes whatever is best.
async fn a_look_for_the_best_is_a_proof(calls_elsewhere: bool) {
    let db = TestDb::new().await;
    let own = Replica::start(&db).await;
    let other = if calls_elsewhere { Some(Replica::start(&db).await) } else { None };
    let calls = other.as_ref().unwrap_or(&own);
    let mut stream = RawStream::open(&own, "worker_id=w").await;
    pour(&db, &own, 20).await;
    stream.drain().await;
    // It looks too late each time, and gets nothing.
    calls.post("/v1/tasks/claim", json!({"worker_id": "w"})).await.expect(200);
    let id = own.create(json!({"title": "news"})).await;
    stream.until(&id).await;
}

#[tokio::test]
async fn s8_a_worker_that_looks_for_the_best_when_it_is_woken_goes_on_hearing() {
    a_look_for_the_best_is_a_proof(false).await;
}

#[tokio::test]
async fn s8_the_same_holds_when_it_looks_on_another_replica() {
    a_look_for_the_best_is_a_proof(true).await;
}

/// What holds no claim can be cut off at no cost: so it is trusted to read.
#[tokio::test]
async fn s8_who_only_watches_is_told_so_much_at_a_time_and_goes_on_hearing() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut watcher = RawStream::open(&replica, "worker_id=watcher").await;
    pour(&db, &replica, 5).await;
    for n in 0..3 {
        let id = replica.create(json!({"title": format!("news {n}"), "priority": -1})).await;
        watcher.until(&id).await;
    }
}

/// A worker that claims one task after the other without reading proves nothing by that.
#[tokio::test]
async fn s8_a_worker_that_takes_the_best_in_a_loop_and_does_not_read_is_not_swamped() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = RawStream::open(&replica, "worker_id=w").await;
    db.execute("insert into tasks (title, prompt) select 'x', repeat('x', 6000) from generate_series(1, 150)").await;
    for _ in 0..150 {
        let found = replica.post("/v1/tasks/claim", json!({"worker_id": "w", "wait": 5})).await;
        let id = found.expect(200)["tasks"][0]["id"].as_str().unwrap().to_owned();
        replica.finish("complete", &id, "w", json!({})).await.expect(200);
    }
    let bytes = stream.drain().await;
    assert!(bytes <= UNREAD_BYTES_MAX + SLACK_BYTES, "{bytes} bytes were on their way");
    // Now that it rests, it hears of more.
    let id = replica.create(json!({"title": "news"})).await;
    stream.until(&id).await;
}
