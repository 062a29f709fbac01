//! F4, F5, F9: the listener's connection is lost, and cannot be had again at once.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Replica, TestDb, eventually};

const KILL_LISTENER: &str = "select pg_terminate_backend(pid) from pg_stat_activity
      where application_name = 'taskwire listener' and datname = current_database()";
const KILL_ALL: &str = "select pg_terminate_backend(pid) from pg_stat_activity
      where application_name like 'taskwire%' and datname = current_database()";

fn listeners(replica: &Replica) -> usize {
    replica.log().matches("listener on").count()
}

#[tokio::test]
async fn f4_a_killed_listener_is_replaced_within_a_second_and_nothing_is_missed() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w").await;
    for n in 1..=5 {
        let killed = Instant::now();
        db.execute(KILL_LISTENER).await;
        let id = replica.create(json!({"title": "during"})).await;
        assert_eq!(stream.announced().await, id);
        eventually("there is another listener", async || (listeners(&replica) > n).then_some(()))
            .await;
        assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());
    }
}

/// A role of the test's own, which owns the database.
async fn own_role(db: &TestDb) -> (String, String) {
    let role = format!("{}_role", db.name);
    db.execute(&format!(
        "create role {role} login password 'own'; alter database {} owner to {role};
         grant all on schema public to {role}",
        db.name
    ))
    .await;
    let (front, rest) = db.url.split_once("://").unwrap();
    let url = format!("{front}://{role}:own@{}", rest.rsplit_once('@').unwrap().1);
    (role, url)
}

#[tokio::test]
async fn f5_what_is_inserted_while_no_connection_is_allowed_is_announced_right_after() {
    let db = TestDb::new().await;
    let (role, url) = own_role(&db).await;
    let replica = Replica::start_with(&db, &["--database-url", &url]).await;
    let mut stream = replica.stream("worker_id=w").await;

    db.execute(&format!("alter role {role} nologin")).await;
    db.execute(KILL_ALL).await;
    eventually("reconnecting has failed a few times", async || {
        (replica.log().matches("listener still lost").count() >= 4).then_some(())
    })
    .await;
    let answer = replica.post("/v1/tasks", json!({"title": "refused"})).await;
    assert_eq!((answer.status, answer.problem().as_str()), (503, "postgres_unavailable"));
    db.execute("insert into tasks (title) values ('in the hole')").await;
    db.execute(&format!("alter role {role} login")).await;
    let possible = Instant::now();
    let announced = loop {
        let event = stream.next().await;
        if event.name == "task_available" {
            break event;
        }
    };
    assert_eq!(announced.data["title"], "in the hole");
    assert!(possible.elapsed() < Duration::from_millis(2_500), "{:?}", possible.elapsed());
    eventually("there is another listener", async || (listeners(&replica) > 1).then_some(())).await;
    let id = replica.create(json!({"title": "after"})).await;
    assert_eq!(stream.announced().await, id);
    drop(replica);
    db.execute(&format!(
        "reassign owned by {role} to current_user; drop owned by {role}; drop role {role}"
    ))
    .await;
}

#[tokio::test]
async fn f9_a_role_without_a_free_connection_is_503_fast_and_its_listener_stays() {
    let db = TestDb::new().await;
    let (role, url) = own_role(&db).await;
    let replica = Replica::start_with(&db, &["--database-url", &url]).await;
    let mut stream = replica.stream("worker_id=w").await;
    // As if others had taken them all: no new connection, and the old ones but the listener's are gone.
    db.execute(&format!("alter role {role} connection limit 1")).await;
    db.execute(&KILL_ALL.replace("like 'taskwire%'", "= 'taskwire'")).await;
    for _ in 0..3 {
        let begun = Instant::now();
        let answer = replica.post("/v1/tasks", json!({"title": "refused"})).await;
        assert_eq!((answer.status, answer.problem().as_str()), (503, "postgres_unavailable"));
        assert!(begun.elapsed() < Duration::from_millis(1_500), "{:?}", begun.elapsed());
    }
    db.execute("insert into tasks (title) values ('meanwhile')").await;
    assert_eq!(listeners(&replica), 1);
    db.execute(&format!("alter role {role} connection limit -1")).await;
    loop {
        let event = stream.next().await;
        if event.name == "task_available" {
            assert_eq!(event.data["title"], "meanwhile");
            break;
        }
    }
    replica.create(json!({"title": "after"})).await;
    assert_eq!(listeners(&replica), 1, "the listener was never lost");
    drop(replica);
    db.execute(&format!(
        "reassign owned by {role} to current_user; drop owned by {role}; drop role {role}"
    ))
    .await;
}
