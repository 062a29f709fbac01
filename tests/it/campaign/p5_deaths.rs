//! P5: a dead worker's task is back after its lease: not later than 2 s after, and not before.
//!
//! All times are Postgres' own. A trigger of the test notes when a task leaves its owner.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use rand::RngExt;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::caller::{Caller, http};
use super::fleet::Fleet;
use super::{Campaign, percentile};
use crate::support::{PATIENCE, TestDb, eventually};

/// The time that is promised beyond the lease.
const GRACE: f64 = 2.0;
/// Workers that live, and die, at the same time.
const AT_ONCE: usize = 64;
/// How long a worker lives at most: longer than its lease, which must have moved on by then.
const LIFE_MS_MAX: u64 = 4_000;

/// How a worker showed that it lived, and how it stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    /// It never did: it claimed and was not heard of again.
    Silent,
    /// Its stream's socket was closed.
    StreamClosed,
    /// Its stream's socket was reset.
    StreamReset,
    /// It sent heartbeats, and stopped.
    HeartbeatsStopped,
    /// It did not die: its stream is open to the end.
    None,
}

/// One worker's end: before when the last sign of life cannot have been, and after when none was.
struct Died {
    task: String,
    death: Death,
    earliest: f64,
    latest: f64,
    /// Of one that lives.
    _stream: Option<TcpStream>,
}

const NOTED: &str = "
    create table returns (task_id uuid, at timestamptz, lease_expires_at timestamptz, status text);
    create function note_return() returns trigger language plpgsql as $$
    begin
        insert into returns values (old.id, clock_timestamp(), old.lease_expires_at, new.status);
        return null;
    end $$;
    create trigger zz_note_return after update on tasks for each row
      when (old.status = 'running' and new.status <> 'running') execute function note_return()";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p5_a_dead_workers_task_is_pending_again_within_its_lease_and_two_seconds_and_not_before() {
    let campaign = Campaign::new("p5_a_dead_workers_task");
    let (deaths, lease) = (campaign.number("DEATHS", 100), campaign.number("LEASE", 5));
    let replicas = campaign.number("REPLICAS", 2);
    let fleet = Fleet::start(&campaign, replicas, &["--lease-seconds", &lease.to_string()]).await;
    fleet.db.execute(NOTED).await;
    fleet.steady(lease).await;
    let http = http();
    let living = deaths / 10;
    let dying = stream::iter(0..deaths + living).map(|n| {
        let caller = Caller::new(&fleet, &http, campaign.rng("worker", n));
        live_and_die(n, n < living, caller, &fleet.db)
    });
    let died: Vec<Died> = dying.buffer_unordered(AT_ONCE.max(living + 16)).collect().await;

    // The leases lapse: a condition on time, of which the table tells.
    eventually("every dead worker's task has left it", async || {
        let left = "select count(*) from tasks where status = 'running'";
        (fleet.db.value(left).await == living.to_string()).then_some(())
    })
    .await;
    let mut after_expiry = judged(&fleet.db, &died, lease).await;
    fleet.expect_sound().await;
    let early = "select count(*) from returns where at < lease_expires_at";
    assert_eq!(fleet.db.value(early).await, "0", "reclaimed before the lease's expiry");
    let [p50, p99] = [0.5, 0.99].map(|share| percentile(&mut after_expiry, share));
    let of = |death| died.iter().filter(|died| died.death == death).count();
    campaign.figures(&format!(
        "{deaths} deaths ({} silent, {} streams closed, {} reset, {} heartbeats stopped) with a lease of {lease} s \
         over {replicas} replicas: all pending again, 0 early, 0 late; later than the lease by p50 {p50:.2?}, \
         p99 {p99:.2?}, at most {:.2?}; {living} living workers lost nothing",
        of(Death::Silent),
        of(Death::StreamClosed),
        of(Death::StreamReset),
        of(Death::HeartbeatsStopped),
        after_expiry.last().copied().unwrap_or_default(),
    ));
}

/// How much later than its lease each task was back.
async fn judged(db: &TestDb, died: &[Died], lease: usize) -> Vec<Duration> {
    let returns = "select json_object_agg(task_id, json_build_array(extract(epoch from at), status)) from returns";
    let returns: Value = serde_json::from_str(&db.value(returns).await).expect("returns");
    #[expect(clippy::cast_precision_loss, reason = "a few seconds")]
    let lease = lease as f64;
    let mut late = Vec::new();
    for Died { task, death, earliest, latest, .. } in died {
        let back = &returns[task];
        if *death == Death::None {
            assert_eq!(*back, Value::Null, "taken from a worker that lives");
            continue;
        }
        let at = back[0].as_f64().unwrap_or_else(|| panic!("{death:?}: not back"));
        assert_eq!(back[1], "pending", "{death:?}");
        let told = format!("{death:?}: back {:.3} s after the last sign of life", at - latest);
        assert!(at <= latest + lease + GRACE, "too late: {told}");
        assert!(at >= earliest + lease, "too early: {told}");
        late.push(Duration::from_secs_f64((at - earliest - lease).max(0.0)));
    }
    late
}

async fn live_and_die(n: usize, lives_on: bool, mut caller: Caller, db: &TestDb) -> Died {
    let kinds = [Death::Silent, Death::StreamClosed, Death::StreamReset, Death::HeartbeatsStopped];
    let kind = kinds[caller.rng.random_range(0..kinds.len())];
    let death = if lives_on { Death::None } else { kind };
    let worker = format!("mortal-{n}");
    let body = json!({"worker_id": worker, "name": worker});
    caller.ask("/v1/agent/workers/register", &body, None).await;
    let has_stream = matches!(death, Death::StreamClosed | Death::StreamReset | Death::None);
    let stream = if has_stream { Some(connect(&mut caller, &worker).await) } else { None };
    let new = json!({"title": worker, "target_worker_id": worker});
    let task = caller.ask("/v1/tasks", &new, Some(&worker)).await.remove(0).json();
    let task = task["id"].as_str().unwrap().to_owned();
    let mut earliest = now(db).await;
    let claim = json!({"worker_id": worker, "claim_id": caller.uuid()});
    caller.ask(&format!("/v1/tasks/{task}/claim"), &claim, None).await.remove(0).expect(200);

    // Lives for a while.
    let life = Duration::from_millis(caller.rng.random_range(0..LIFE_MS_MAX));
    let end = Instant::now() + life;
    if death == Death::HeartbeatsStopped {
        let body = json!({"worker_id": worker, "claim_epoch": 1});
        while Instant::now() < end {
            caller.pause(200, 500).await;
            earliest = now(db).await;
            let path = format!("/v1/tasks/{task}/heartbeat");
            caller.ask(&path, &body, None).await.remove(0).expect(200);
        }
    } else if has_stream {
        tokio::time::sleep_until(end.into()).await;
        earliest = now(db).await;
    }
    let stream = stream.filter(|stream| {
        if death == Death::StreamReset {
            stream.set_zero_linger().expect("a socket");
        }
        death == Death::None
    });
    Died { task, death, earliest, latest: now(db).await, _stream: stream }
}

/// Postgres' clock.
async fn now(db: &TestDb) -> f64 {
    db.value("select extract(epoch from clock_timestamp())").await.parse().expect("seconds")
}

/// Opens a stream as bytes, so that its socket is ours to break; again where it is put off.
async fn connect(caller: &mut Caller, worker: &str) -> TcpStream {
    let slot = caller.rng.random_range(0..caller.fleet.slots.len());
    let address = {
        let replica = caller.fleet.slots[slot].replica.lock().await;
        replica.as_ref().expect("a replica").url.strip_prefix("http://").unwrap().to_owned()
    };
    let request =
        format!("GET /v1/worker/tasks/stream?worker_id={worker} HTTP/1.1\r\nHost: x\r\n\r\n");
    eventually("a stream opens", async || {
        let mut socket = TcpStream::connect(&address).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        let (mut text, mut bytes) = (String::new(), [0; 4096]);
        while !text.contains("event: connected\n") {
            let read = tokio::time::timeout(PATIENCE, socket.read(&mut bytes)).await;
            let count = read.expect("in time").unwrap();
            if count == 0 || text.contains(" 503 ") {
                eprintln!("no stream: {text}");
                return None;
            }
            text.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        Some(socket)
    })
    .await
}
