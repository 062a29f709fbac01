//! What an operator may write that no reader expects.

use futures_util::future::join_all;
use serde_json::json;

use crate::support::{Replica, TestDb, eventually};

#[tokio::test]
async fn p20_a_row_that_cannot_be_read_whole_spoils_no_other_and_can_be_claimed() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    // A number that Postgres takes, and no JSON reader of ours.
    db.execute("insert into tasks (title, metadata) values ('odd', '{\"x\":1e400}')").await;
    let odd = db.value("select id from tasks").await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    assert_eq!(stream.announced().await, odd);
    let task = replica.task(&odd).await;
    assert!(task["metadata"]["unreadable"].is_string(), "{task}");

    let mut ids = vec![odd];
    for n in 0..20 {
        ids.push(replica.create(json!({"title": format!("{n}")})).await);
    }
    let answers = join_all(ids.iter().map(|id| replica.claim(id, "w"))).await;
    assert!(answers.iter().all(|answer| answer.status == 200), "{answers:?}");
}

#[tokio::test]
async fn p20_a_column_of_another_type_is_read_again_at_once() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let id = replica.create(json!({"title": "x"})).await;
    join_all((0..32).map(|_| replica.task(&id))).await;
    db.execute("alter table tasks alter column agent_type type varchar").await;
    eventually("every connection has forgotten its plans", async || {
        let path = format!("/v1/tasks/{id}");
        let answers = join_all((0..16).map(|_| replica.get(&path))).await;
        assert!(answers.iter().all(|answer| answer.status != 500), "{answers:?}");
        answers.iter().all(|answer| answer.status == 200).then_some(())
    })
    .await;
}
