//! The next task in the answer to a complete.

use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use uuid::Uuid;

use super::{finish, given, is_quiet, running};
use crate::support::{Replica, TestDb};

async fn complete_for_next(replica: &Replica, task: &Value) -> Value {
    let path = format!("/v1/tasks/{}/complete?next=1", task["id"].as_str().unwrap());
    let body = json!({"worker_id": task["claimed_by"], "claim_epoch": task["claim_epoch"]});
    replica.post(&path, body).await.expect(200)
}

#[tokio::test]
async fn complete_next_carries_the_next_task() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("plain", &[], &[]).await;
    for (title, priority) in [("a", 3), ("b", 2), ("c", 1)] {
        replica.create(json!({"title": title, "priority": priority})).await;
    }
    let id = db.value("select id from tasks where title = 'a'").await;
    let first = replica.claim(&id, "plain").await.expect(200);
    let answer = complete_for_next(&replica, &first).await;
    assert_eq!((&answer["status"], &answer["task_id"]), (&json!("completed"), &json!(id)));
    let next = &answer["next"];
    assert_eq!((&next["title"], &next["status"]), (&json!("b"), &json!("running")));
    assert_eq!((&next["claim_epoch"], &next["lease_expires_in"]), (&json!(1), &json!(60)));
    // The repetition of a call whose answer was lost gets the same one, and no other.
    assert_eq!(complete_for_next(&replica, &first).await["next"]["id"], next["id"]);
    assert_eq!(running(&db, "plain").await, 1);
    let second = complete_for_next(&replica, next).await;
    assert_eq!(second["next"]["title"], "c");
    // What the repetition would get has ended.
    assert_eq!(complete_for_next(&replica, &first).await["next"], Value::Null);
    assert_eq!(complete_for_next(&replica, &second["next"]).await["next"], Value::Null);
    assert_eq!(running(&db, "plain").await, 0);
}

#[tokio::test]
async fn next_is_1_or_0_and_only_1_asks_for_a_task() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let id = replica.create(json!({"title": "x"})).await;
    replica.create(json!({"title": "y"})).await;
    let claim = replica.claim(&id, "w").await.expect(200);
    for next in ["2", "true", "", "-1"] {
        let body = json!({"worker_id": "w", "claim_epoch": claim["claim_epoch"]});
        let answer = replica.post(&format!("/v1/tasks/{id}/complete?next={next}"), body).await;
        assert_eq!((answer.status, answer.problem().as_str()), (400, "invalid_parameter"));
    }
    let answer =
        replica.post(&format!("/v1/tasks/{id}/complete?next=0&worker_id=w"), json!({})).await;
    assert!(answer.expect(200).get("next").is_none());
    assert_eq!(running(&db, "w").await, 0);
}

async fn the_next_task_fills_the_slot(calls_elsewhere: bool) {
    let db = TestDb::new().await;
    let own = Replica::start(&db).await;
    let other = if calls_elsewhere { Some(Replica::start(&db).await) } else { None };
    let calls = other.as_ref().unwrap_or(&own);
    let mut stream = own.stream("worker_id=w&slots=2").await;
    db.execute("insert into tasks (title) select 'x' from generate_series(1, 30)").await;
    let (mut task, other_one) = (given(&mut stream).await.data, given(&mut stream).await);
    for _ in 0..20 {
        task = complete_for_next(calls, &task).await["next"].clone();
        assert_eq!(task["status"], "running");
        assert!(running(&db, "w").await <= 2);
    }
    is_quiet(&mut stream).await;
    assert_eq!(running(&db, "w").await, 2);
    // The slot is known to be filled: it is free when that task ends.
    let id = task["id"].as_str().unwrap();
    calls.finish("complete", id, "w", json!({"claim_epoch": 1})).await.expect(200);
    let event = given(&mut stream).await;
    finish(calls, "complete", &other_one, json!({})).await;
    finish(calls, "complete", &event, json!({})).await;
    given(&mut stream).await;
}

#[tokio::test]
async fn the_next_task_fills_the_slot_of_the_one_before() {
    the_next_task_fills_the_slot(false).await;
}

#[tokio::test]
async fn the_next_task_fills_the_slot_also_when_the_call_lands_elsewhere() {
    the_next_task_fills_the_slot(true).await;
}

/// The id of the claim that follows the first claim of a task, as the server makes it: the task's id, with the
/// epoch in its last bytes.
fn claim_after_the_first(task: &str) -> Uuid {
    let mut bytes = task.parse::<Uuid>().unwrap().into_bytes();
    bytes[15] ^= 1;
    bytes[6] = bytes[6] & 0x0f | 0x80;
    Uuid::from_bytes(bytes)
}

#[tokio::test]
async fn when_nobody_knows_whether_the_next_task_was_claimed_the_call_is_refused_and_its_repetition_gets_it()
 {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&slots=1").await;
    let id = replica.create(json!({"title": "first"})).await;
    let first = given(&mut stream).await.data;
    // Another call for the same claim that does not end: a session that holds its lock.
    let mut other_call = PgConnection::connect(&db.url).await.unwrap();
    let key = format!("hashtextextended('w {}', 0)", claim_after_the_first(&id));
    let lock = sqlx::AssertSqlSafe(format!("select pg_advisory_lock({key})"));
    other_call.execute(lock).await.unwrap();
    let path = format!("/v1/tasks/{id}/complete?next=1");
    let body = json!({"worker_id": "w", "claim_epoch": first["claim_epoch"], "result": 7});
    let refused = replica.post(&path, body.clone()).await;
    assert_eq!(refused.status, 503, "{}", refused.text);
    assert_eq!(replica.task(&id).await["status"], "completed");
    other_call.close().await.unwrap();
    let second = replica.create(json!({"title": "second"})).await;
    let answer = replica.post(&path, body).await.expect(200);
    // It is in the answer, or in the slot that was free meanwhile; and nowhere else.
    if answer["next"].is_null() {
        assert_eq!(given(&mut stream).await.task(), second);
    } else {
        assert_eq!(answer["next"]["id"], json!(second));
        is_quiet(&mut stream).await;
    }
    assert_eq!(running(&db, "w").await, 1);
}
