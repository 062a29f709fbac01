//! S4, S10: streams that end by age, and hints when to come back.

use serde_json::json;

use crate::support::{Replica, TestDb};

#[tokio::test]
async fn s4_a_stream_ends_by_age_only_when_that_costs_its_worker_no_claim() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--worker-sse-max-age", "1"]).await;
    let mut holder = replica.stream("worker_id=holder&events=task_available").await;
    let held = replica.create(json!({"title": "held", "target_worker_id": "holder"})).await;
    assert_eq!(holder.announced().await, held);
    replica.claim(&held, "holder").await.expect(200);
    for _ in 0..3 {
        let mut idle = replica.stream("worker_id=idle").await;
        let error = idle.expect("error").await.data;
        assert_eq!((&error["code"], &error["reconnect"]), (&json!("max_age"), &json!(true)));
        assert!(idle.has_ended().await);
    }
    let metrics = replica.get("/metrics").await.text;
    assert!(metrics.contains("taskwire_streams_ended_total{outcome=\"max_age\"} 3"), "{metrics}");
    // It was looked at meanwhile, and goes on as if nothing had been.
    let id = replica.create(json!({"title": "next", "target_worker_id": "holder"})).await;
    assert_eq!(holder.announced().await, id);
    replica.finish("complete", &held, "holder", json!({})).await.expect(200);
}

/// A worker that waits for whatever is best does not read its stream: the claim would be lost with it.
#[tokio::test]
async fn s4_the_stream_of_a_worker_that_waits_for_the_best_does_not_end_by_age() {
    let db = TestDb::new().await;
    let flags = ["--worker-sse-max-age", "1", "--lease-seconds", "2"];
    let own = Replica::start_with(&db, &flags).await;
    let other = Replica::start_with(&db, &flags).await;
    for (worker, calls) in [("here", &own), ("there", &other)] {
        let stream = own.stream(&format!("worker_id={worker}")).await;
        let body = json!({"worker_id": worker, "wait": 60});
        let waiting = calls.post("/v1/tasks/claim", body);
        // Several looks at its age pass, and two leases.
        let task = async {
            let mut idle = own.stream("worker_id=idle").await;
            while idle.expect("error").await.data["code"] != "max_age" {}
            let mut idle = own.stream("worker_id=idle").await;
            while idle.expect("error").await.data["code"] != "max_age" {}
            own.create(json!({"title": "x", "target_worker_id": worker})).await
        };
        let (answer, id) = tokio::join!(waiting, task);
        assert_eq!(answer.expect(200)["tasks"][0]["id"], id.as_str());
        let connected = own.get(&format!("/v1/workers/{worker}/status")).await.expect(200);
        assert_eq!(connected["connected"], true, "{connected}");
        own.finish("complete", &id, worker, json!({})).await.expect(200);
        drop(stream);
    }
}

#[tokio::test]
async fn a_stream_never_ends_by_age_when_the_setting_says_so() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--worker-sse-max-age", "0"]).await;
    let mut stream = replica.stream("worker_id=w").await;
    let id = replica.create(json!({"title": "x"})).await;
    assert_eq!(stream.announced().await, id);
}

#[tokio::test]
async fn s10_whoever_is_sent_away_is_told_when_to_come_back_and_each_another_time() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut streams = Vec::new();
    for n in 0..6 {
        streams.push(replica.stream(&format!("worker_id=w-{n}")).await);
    }
    replica.signal("TERM");
    let mut hints = Vec::new();
    for stream in &mut streams {
        hints.push(stream.expect("error").await.retry_ms.expect("a hint"));
    }
    assert!(hints.iter().all(|ms| (500..3_000).contains(ms)), "{hints:?}");
    hints.sort_unstable();
    hints.dedup();
    assert!(hints.len() > 1, "{hints:?}");
}
