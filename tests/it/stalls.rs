//! F26, F29: a replica that stood still for a while.

use std::time::Duration;

use serde_json::json;

use crate::support::{Replica, TestDb, eventually};

#[tokio::test]
async fn f26_f29_a_replica_that_stood_still_says_so_and_its_workers_hear_of_everything() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let other = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    replica.signal("STOP");
    let id = other.create(json!({"title": "meanwhile"})).await;
    // As long as a stall that is worth a line.
    tokio::time::sleep(Duration::from_secs(2)).await;
    replica.signal("CONT");
    assert_eq!(stream.announced().await, id);
    eventually("it says so", async || {
        replica.log().contains("this process stood still for").then_some(())
    })
    .await;
    let metrics = replica.get("/metrics").await.text;
    assert!(metrics.contains("taskwire_stalls_total 1"), "{metrics}");
}
