//! F6, F7, F8: links to Postgres that go silent, are reset, or are slow.

use std::time::{Duration, Instant};

use serde_json::json;

use super::link::FaultyLink;
use crate::support::{Replica, SseStream, TestDb, eventually};

/// What a request may take while Postgres is away.
const REFUSED_WITHIN: Duration = Duration::from_millis(1_900);
/// Within this a dead listener is found and replaced.
const FOUND_WITHIN: Duration = Duration::from_secs(10);

/// A pulse that was the newest for so long is the one that beats.
const PULSE_STANDS: Duration = Duration::from_millis(1_500);

async fn replica_over(link: &FaultyLink, db: &TestDb) -> Replica {
    Replica::start_with(db, &["--database-url", &link.url]).await
}

/// The next announced task; what else comes is passed over.
async fn announced(stream: &mut SseStream) -> String {
    loop {
        let event = stream.next().await;
        if event.name == "task_available" {
            return event.task().to_owned();
        }
    }
}

fn listeners(replica: &Replica) -> usize {
    replica.log().matches("listener on").count()
}

#[tokio::test]
async fn f6_a_link_that_goes_silent_is_answered_503_in_time_and_replaced() {
    let db = TestDb::new().await;
    let link = FaultyLink::to(&db).await;
    let replica = replica_over(&link, &db).await;
    let mut stream = replica.stream("worker_id=w").await;
    replica.create(json!({"title": "before"})).await;
    announced(&mut stream).await;

    let pulses = async || {
        let sql = "select coalesce(min(pid), 0) from pg_stat_activity
                    where application_name = 'taskwire pulse' and datname = current_database()
                      and backend_start = (select max(backend_start) from pg_stat_activity
                            where application_name = 'taskwire pulse' and datname = current_database())";
        db.value(sql).await
    };
    let mut last_pulse = "0".to_owned();
    for (to_postgres, from_postgres) in [(true, false), (false, true), (true, true)] {
        let before = listeners(&replica);
        // What watches the link is a connection of its own, which must be there to die with the others.
        let mut same = (String::new(), Instant::now());
        while same.1.elapsed() < PULSE_STANDS || same.0 == last_pulse {
            let pulse = eventually("there is a pulse", async || {
                let pulse = pulses().await;
                (pulse != last_pulse).then_some(pulse)
            })
            .await;
            if pulse != same.0 {
                same = (pulse, Instant::now());
            }
        }
        last_pulse = same.0;
        let begun = Instant::now();
        link.silence(to_postgres, from_postgres);
        // Group commit and reads: everybody is told within the time that was promised, or served by a
        // new connection by then.
        let worker = json!({"name": "other", "worker_id": "other"});
        let (create, read, register) = tokio::join!(
            replica.post("/v1/tasks", json!({"title": "during"})),
            replica.get("/v1/tasks"),
            replica.post("/v1/agent/workers/register", worker),
        );
        for answer in [create, read, register] {
            if ![200, 201].contains(&answer.status) {
                let refused = (answer.status, answer.problem());
                assert_eq!(refused, (503, "postgres_unavailable".to_owned()));
            }
        }
        assert!(begun.elapsed() < REFUSED_WITHIN, "{:?}", begun.elapsed());
        eventually("new connections serve", async || {
            let answer = replica.post("/v1/tasks", json!({"title": "after"})).await;
            (answer.status == 201).then_some(())
        })
        .await;
        announced(&mut stream).await;
        // One that still hears loses nothing by not being heard.
        eventually("there is another listener", async || {
            (!from_postgres || listeners(&replica) > before).then_some(())
        })
        .await;
        assert!(begun.elapsed() < FOUND_WITHIN, "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn f6_a_postgres_that_cannot_be_reached_for_a_while_wedges_nothing() {
    let db = TestDb::new().await;
    let link = FaultyLink::to(&db).await;
    let replica = replica_over(&link, &db).await;
    replica.create(json!({"title": "before"})).await;
    link.silence_new();
    // More requests than there are connections, for longer than any of them waits.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        // Only four listings are read at a time.
        let methods = (0..40).map(|n| if n < 4 { "GET" } else { "POST" });
        let calls = methods.map(async |method| {
            let asked = Instant::now();
            let request = replica.http(method, "/v1/tasks").json(&json!({"title": "during"}));
            let answer = replica.request(request).await;
            assert_eq!(answer.status, 503, "{answer:?}");
            asked.elapsed()
        });
        let slowest = futures_util::future::join_all(calls).await.into_iter().max().unwrap();
        assert!(slowest < REFUSED_WITHIN, "{slowest:?}");
    }
    link.mend();
    let mended = Instant::now();
    eventually("it serves again", async || {
        (replica.post("/v1/tasks", json!({"title": "after"})).await.status == 201).then_some(())
    })
    .await;
    assert!(mended.elapsed() < Duration::from_secs(6), "{:?}", mended.elapsed());
}

#[tokio::test]
async fn f7_a_reset_listener_is_replaced_and_what_it_missed_is_announced() {
    let db = TestDb::new().await;
    let link = FaultyLink::to(&db).await;
    let flags = ["--database-listen-url", &link.url];
    let replica = Replica::start_with(&db, &flags).await;
    let mut stream = replica.stream("worker_id=w").await;
    for n in 0..3 {
        let before = listeners(&replica);
        link.reset();
        let id = replica.create(json!({"title": format!("{n}")})).await;
        assert_eq!(announced(&mut stream).await, id);
        eventually("there is another listener", async || {
            (listeners(&replica) > before).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn f8_half_a_second_to_postgres_costs_time_but_no_lease_and_no_call() {
    let db = TestDb::new().await;
    let link = FaultyLink::to(&db).await;
    let flags = ["--database-url", &link.url, "--lease-seconds", "5"];
    let replica = Replica::start_with(&db, &flags).await;
    let mut stream = replica.stream("worker_id=streams").await;
    replica.register("calls", &[], &[]).await;
    let first = replica.create(json!({"title": "by stream", "target_worker_id": "streams"})).await;
    let second = replica.create(json!({"title": "by calls", "target_worker_id": "calls"})).await;
    assert_eq!(announced(&mut stream).await, first);
    replica.claim(&first, "streams").await.expect(200);
    replica.claim(&second, "calls").await.expect(200);

    for delay_ms in [25, 250] {
        link.delay(Duration::from_millis(delay_ms));
        let begun = Instant::now();
        // Two leases long.
        while begun.elapsed() < Duration::from_secs(if delay_ms == 250 { 7 } else { 2 }) {
            let body = json!({"worker_id": "calls"});
            let path = format!("/v1/tasks/{second}/heartbeat");
            let beat = replica.post(&path, body);
            let (beat, create) =
                tokio::join!(beat, replica.post("/v1/tasks", json!({"title": "more"})));
            beat.expect(200);
            create.expect(201);
            announced(&mut stream).await;
        }
    }
    replica.finish("complete", &first, "streams", json!({"claim_epoch": 1})).await.expect(200);
    replica.finish("complete", &second, "calls", json!({"claim_epoch": 1})).await.expect(200);
    assert!(!replica.log().contains("listener lost"), "the slow listener was given up");
}

#[tokio::test]
async fn f8_a_server_starts_over_a_slow_link() {
    let db = TestDb::new().await;
    drop(Replica::start(&db).await);
    let link = FaultyLink::to(&db).await;
    link.delay(Duration::from_millis(150));
    let replica = replica_over(&link, &db).await;
    replica.create(json!({"title": "x"})).await;
}
