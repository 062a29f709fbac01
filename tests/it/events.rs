//! `GET /v1/tasks/{id}/events`: a producer or a browser follows one task to its end.

use serde_json::{Value, json};

use crate::support::sse::Event;
use crate::support::{Replica, SseStream, TestDb};

async fn follow(replica: &Replica, id: &str) -> SseStream {
    SseStream::follow(&replica.url, id).await
}

async fn next(stream: &mut SseStream) -> Event {
    loop {
        let event = stream.next().await;
        // The hint how long to wait before a reconnect is an event without a name.
        if !event.name.is_empty() {
            return event;
        }
    }
}

async fn two_replicas() -> (TestDb, [Replica; 2]) {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    replicas[0].register("w", &[], &[]).await;
    (db, replicas)
}

#[tokio::test]
async fn a_task_is_followed_to_its_end_on_a_replica_that_nothing_of_it_went_through() {
    let (_db, [replica, other]) = two_replicas().await;
    let id = replica.create(json!({"title": "x"})).await;
    let mut events = follow(&other, &id).await;
    let pending = next(&mut events).await;
    assert_eq!((pending.name.as_str(), pending.task()), ("state", id.as_str()));
    assert_eq!((&pending.data["status"], &pending.data["attempt"]), (&json!("pending"), &json!(0)));

    replica.claim(&id, "w").await.expect(200);
    let running = next(&mut events).await;
    assert_eq!(running.name, "state");
    let told = (&running.data["status"], &running.data["claimed_by"], &running.data["claim_epoch"]);
    assert_eq!(told, (&json!("running"), &json!("w"), &json!(1)));

    let said = json!({"progress": 0.5, "message": "half way"});
    replica.finish("heartbeat", &id, "w", said).await.expect(200);
    let progress = next(&mut events).await;
    assert_eq!(progress.name, "progress");
    let expected = json!({"task_id": id, "attempt": 1, "progress": 0.5, "message": "half way"});
    assert_eq!(progress.data, expected);

    replica.post(&format!("/v1/tasks/{id}/cancel"), json!({})).await.expect(200);
    assert_eq!(next(&mut events).await.data["cancel_requested"], true);

    replica.finish("complete", &id, "w", json!({"result": {"answer": 42}})).await.expect(200);
    let ended = next(&mut events).await;
    assert_eq!((ended.name.as_str(), &ended.data["status"]), ("ended", &json!("completed")));
    assert_eq!(ended.data["result"], json!({"answer": 42}));
    assert!(events.has_ended().await);
}

#[tokio::test]
async fn who_comes_late_hears_of_the_end_once_and_a_browser_then_stays_away() {
    let (_db, [replica, other]) = two_replicas().await;
    let id = replica.create(json!({"title": "x"})).await;
    let large = "x".repeat(20_000);
    replica.claim(&id, "w").await.expect(200);
    replica.finish("complete", &id, "w", json!({"result": large})).await.expect(200);
    let mut events = follow(&other, &id).await;
    let ended = next(&mut events).await;
    assert_eq!((ended.name.as_str(), &ended.data["status"]), ("ended", &json!("completed")));
    assert_eq!((&ended.data["partial"], ended.data.get("result")), (&json!(true), None));
    assert!(events.has_ended().await);
    // Its EventSource comes back by itself, and 204 is what tells it not to (WHATWG HTML, 9.2.3).
    let again =
        other.http("GET", &format!("/v1/tasks/{id}/events")).header("Last-Event-ID", "ended");
    assert_eq!(other.request(again).await.status, 204);
    let missing = other.get("/v1/tasks/00000000-0000-0000-0000-000000000000/events").await;
    assert_eq!(missing.problem(), "task_not_found");
}

#[tokio::test]
async fn a_task_that_is_retried_requeued_or_deleted_is_followed_through_all_of_it() {
    let (db, [replica, other]) = two_replicas().await;
    let id = replica.create(json!({"title": "x"})).await;
    let mut events = follow(&other, &id).await;
    assert_eq!(next(&mut events).await.data["status"], "pending");
    replica.claim(&id, "w").await.expect(200);
    assert_eq!(next(&mut events).await.data["status"], "running");
    replica.finish("fail", &id, "w", json!({"error": "boom"})).await.expect(200);
    let failed = next(&mut events).await.data;
    assert_eq!((&failed["status"], &failed["error"]), (&json!("pending"), &json!("boom")));
    db.execute(&format!("select requeue_task('{id}')")).await;
    let requeued = next(&mut events).await.data;
    assert_eq!((&requeued["attempt"], &requeued["error"]), (&json!(0), &Value::Null));
    db.execute("delete from tasks").await;
    let gone = next(&mut events).await;
    assert_eq!((gone.name.as_str(), &gone.data["code"]), ("error", &json!("task_not_found")));
    assert_eq!(gone.data["reconnect"], false);
    assert!(events.has_ended().await);
}

#[tokio::test]
async fn however_many_join_all_hear_of_the_end_in_time() {
    let (_db, [replica, other]) = two_replicas().await;
    let id = replica.create(json!({"title": "x"})).await;
    let mut events = follow(&other, &id).await;
    assert_eq!(next(&mut events).await.data["status"], "pending");
    replica.claim(&id, "w").await.expect(200);
    replica.finish("complete", &id, "w", json!({})).await.expect(200);
    let joining = async {
        // Each new one is served at once, which must not put the others off.
        let mut joined = Vec::new();
        loop {
            let id = replica.create(json!({"title": "y"})).await;
            joined.push(follow(&other, &id).await);
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        () = joining => {}
        () = async { while next(&mut events).await.name != "ended" {} } => {}
    }
}

#[tokio::test]
async fn many_may_follow_many_tasks_and_a_drain_sends_them_to_another_replica() {
    let (_db, [replica, mut other]) = two_replicas().await;
    let mut followers = Vec::new();
    for _ in 0..20 {
        let id = replica.create(json!({"title": "x"})).await;
        for _ in 0..3 {
            let mut events = follow(&other, &id).await;
            assert_eq!(next(&mut events).await.task(), id);
            followers.push((id.clone(), events));
        }
    }
    for (id, _) in followers.iter().step_by(3) {
        replica.claim(id, "w").await.expect(200);
    }
    for (id, events) in &mut followers {
        let running = next(events).await;
        assert_eq!((running.task(), &running.data["status"]), (id.as_str(), &json!("running")));
    }
    other.signal("TERM");
    for (_, events) in &mut followers {
        let end = next(events).await;
        assert_eq!((&end.data["code"], &end.data["reconnect"]), (&json!("draining"), &json!(true)));
        assert!(events.has_ended().await);
    }
    assert!(other.ends_within(std::time::Duration::from_secs(5)).await.is_some());
}
