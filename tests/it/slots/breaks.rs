//! Streams with slots that end, break and come back; and Postgres that goes away meanwhile.

use std::time::Duration;

use serde_json::json;

use super::crowds::Crew;
use super::{complete, given, is_quiet, running};
use crate::support::{Replica, TestDb, eventually};

#[tokio::test]
async fn a_reconnect_redelivers_what_is_held() {
    let db = TestDb::new().await;
    let (own, other) = (Replica::start(&db).await, Replica::start(&db).await);
    let mut stream = own.stream("worker_id=w&slots=3").await;
    db.execute("insert into tasks (title) select 'x' from generate_series(1, 4)").await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(given(&mut stream).await);
    }
    for replica in [&own, &other, &own] {
        drop(stream);
        stream = replica.stream("worker_id=w&slots=3").await;
        let mut again = Vec::new();
        for _ in 0..3 {
            let event = given(&mut stream).await;
            assert_eq!(event.data["redelivered"], true);
            assert_eq!(event.data["claim_epoch"], 1);
            again.push(event.task().to_owned());
        }
        again.sort();
        let mut known: Vec<_> = held.iter().map(|event| event.task().to_owned()).collect();
        known.sort();
        assert_eq!(again, known);
        is_quiet(&mut stream).await;
    }
    complete(&own, &held.remove(0)).await;
    let fourth = given(&mut stream).await;
    assert!(fourth.data.get("redelivered").is_none());
    assert_eq!(running(&db, "w").await, 3);
}

#[tokio::test]
async fn a_superseded_stream_orphans_nothing() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    // A worker that takes its stream from one replica to the other and back while tasks come.
    let crew = Crew::new(&replicas);
    let mut streams = Vec::new();
    for round in 0..12 {
        let replica = &replicas[round % 2];
        let sql = "insert into tasks (title) select 'x' from generate_series(1, 10)";
        let (stream, ()) = tokio::join!(replica.stream("worker_id=w&slots=7"), db.execute(sql));
        streams.push(crew.work(stream));
    }
    crew.until_done(&db, 120).await;
    assert_eq!(running(&db, "w").await, 0);
    assert_eq!(db.value("select count(*) from tasks where attempt > 1").await, "0");
}

/// A claim that comes about when its stream is gone already: the table is locked while it is made.
#[tokio::test]
async fn a_stream_that_breaks_before_its_bytes_left_costs_no_attempt() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    db.execute("insert into tasks (title) select 'x' from generate_series(1, 3)").await;
    let mut operator = db.pool.begin().await.unwrap();
    sqlx::query("lock table tasks in share row exclusive mode")
        .execute(&mut *operator)
        .await
        .unwrap();
    let stream = replica.stream("worker_id=w&slots=3").await;
    let waits = "select count(*) from pg_stat_activity
                  where datname = current_database() and wait_event_type = 'Lock' and query like '-- task_claim_next%'";
    eventually("the claim waits", || async { (db.value(waits).await == "1").then_some(()) }).await;
    drop(stream);
    eventually("the stream is gone", || async {
        (db.value("select count(*) from streams").await == "0").then_some(())
    })
    .await;
    operator.commit().await.unwrap();
    eventually("they are back", || async {
        let back = "select count(*) from tasks where status = 'pending' and attempt = 0 and claim_epoch = 1";
        (db.value(back).await == "3").then_some(())
    })
    .await;
    assert_eq!(db.value("select count(*) from attempts where outcome = 'released'").await, "3");
    let mut stream = replica.stream("worker_id=v&slots=3").await;
    assert_eq!(given(&mut stream).await.data["attempt"], 1);
}

#[tokio::test]
async fn a_replica_that_drains_gives_nothing_more_and_leaves_nothing_behind() {
    let db = TestDb::new().await;
    let mut replica = Replica::start_with(&db, &["--drain-seconds", "3"]).await;
    let mut streams =
        [replica.stream("worker_id=a&slots=1").await, replica.stream("worker_id=b&slots=1").await];
    replica.signal("TERM");
    eventually("it drains", || async {
        (replica.get("/readyz").await.status == 503).then_some(())
    })
    .await;
    db.execute("insert into tasks (title) select 'x' from generate_series(1, 4)").await;
    for stream in &mut streams {
        let event = stream.expect("error").await;
        assert_eq!(event.data["code"], "draining");
    }
    assert!(replica.ends_within(Duration::from_secs(8)).await.is_some());
    assert_eq!(db.value("select count(*) from tasks where claim_epoch = 0").await, "4");
}

#[tokio::test]
async fn claims_that_were_made_for_a_replica_that_ends_are_given_back() {
    let db = TestDb::new().await;
    let mut replica = Replica::start(&db).await;
    db.execute("insert into tasks (title) values ('x')").await;
    let mut operator = db.pool.begin().await.unwrap();
    sqlx::query("lock table tasks in share row exclusive mode")
        .execute(&mut *operator)
        .await
        .unwrap();
    let mut stream = replica.stream("worker_id=w&slots=3").await;
    let waits = "select count(*) from pg_stat_activity
                  where datname = current_database() and wait_event_type = 'Lock' and query like '-- task_claim_next%'";
    eventually("the claim waits", || async { (db.value(waits).await == "1").then_some(()) }).await;
    replica.signal("TERM");
    assert_eq!(stream.expect("error").await.data["code"], "draining");
    operator.commit().await.unwrap();
    assert!(replica.ends_within(Duration::from_secs(8)).await.is_some());
    assert_eq!(db.value("select status || attempt || claim_epoch from tasks").await, "pending01");
}

#[tokio::test]
async fn killed_backends_lose_nothing() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let crew = Crew::new(&replicas);
    for (n, replica) in replicas.iter().enumerate() {
        crew.work(replica.stream(&format!("worker_id=w{n}&slots=20")).await);
    }
    for _ in 0..15 {
        db.execute("insert into tasks (title) select 'x' from generate_series(1, 40)").await;
        db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity
              where datname = current_database() and application_name = 'taskwire' and random() < 0.7",
        )
        .await;
    }
    crew.until_done(&db, 600).await;
    assert_eq!(db.value("select count(*) from tasks where status <> 'completed'").await, "0");
    assert_eq!(db.value("select count(*) from attempts where outcome = 'lapsed'").await, "0");
}

#[tokio::test]
async fn a_worker_goes_on_after_a_crash_of_its_replica() {
    let db = TestDb::new().await;
    let (first, second) = (Replica::start(&db).await, Replica::start(&db).await);
    let mut stream = first.stream("worker_id=w&slots=2").await;
    db.execute("insert into tasks (title) select 'x' from generate_series(1, 3)").await;
    let held = [given(&mut stream).await, given(&mut stream).await];
    first.kill();
    assert!(stream.has_ended().await);
    let mut stream = second.stream("worker_id=w&slots=2").await;
    for _ in 0..2 {
        assert_eq!(given(&mut stream).await.data["redelivered"], true);
    }
    for event in &held {
        complete(&second, event).await;
    }
    given(&mut stream).await;
    let done = json!(db.value("select count(*) from tasks where status = 'completed'").await);
    assert_eq!(done, "2");
}
