//! E3: while Postgres is away writes are refused fast, streams stay open, and nothing is lost.

mod dangers;
mod half_open;
mod link;
mod listener;
mod pooler;
mod standby;
mod vacuum;

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::proxy::Proxy;
use crate::support::{Replica, TestDb, eventually};

/// The database's URL with the proxy in the place of the server.
async fn through_proxy(db: &TestDb) -> (Proxy, String) {
    let (front, rest) = db.url.rsplit_once('@').unwrap();
    let (target, path) = rest.split_once('/').unwrap();
    let proxy = Proxy::to(target.to_owned()).await;
    let url = format!("{front}@{}/{path}", proxy.address);
    (proxy, url)
}

#[tokio::test]
async fn e3_an_outage_is_503_for_writes_and_keepalives_for_streams_and_heals_by_itself() {
    let db = TestDb::new().await;
    let (proxy, url) = through_proxy(&db).await;
    let flags = ["--database-url", &url, "--worker-sse-keepalive", "1"];
    let replica = Replica::start_with(&db, &flags).await;
    let mut stream = replica.stream("worker_id=w").await;
    let before = replica.create(json!({"title": "before"})).await;
    assert_eq!(stream.announced().await, before);

    proxy.cut();
    for _ in 0..3 {
        let begun = Instant::now();
        let answer = replica.post("/v1/tasks", json!({"title": "during"})).await;
        assert_eq!((answer.status, answer.problem().as_str()), (503, "postgres_unavailable"));
        assert!(answer.headers.contains_key("retry-after"));
        assert!(begun.elapsed() < Duration::from_millis(1_500), "{:?}", begun.elapsed());
    }
    assert_eq!(replica.claim(&before, "w").await.status, 503);
    assert_eq!(replica.get(&format!("/v1/tasks/{before}")).await.status, 503);
    let refused = replica.get("/v1/worker/tasks/stream?worker_id=other").await;
    assert_eq!((refused.status, refused.problem().as_str()), (503, "postgres_unavailable"));
    assert_eq!(replica.get("/healthz").await.status, 200);
    let ready = replica.get("/readyz").await;
    assert_eq!((ready.status, ready.problem().as_str()), (503, "not_ready"));
    for _ in 0..2 {
        stream.expect("keepalive").await;
    }
    // Inserted while nobody could tell the replica.
    db.execute("insert into tasks (title) values ('unheard')").await;

    proxy.mend();
    loop {
        let event = stream.next().await;
        if event.name == "task_available" {
            assert_eq!(event.data["title"], "unheard");
            break;
        }
    }
    eventually("it is ready again", async || {
        (replica.get("/readyz").await.status == 200).then_some(())
    })
    .await;
    replica.claim(&before, "w").await.expect(200);
    replica.finish("complete", &before, "w", json!({"claim_epoch": 1})).await.expect(200);
}

#[tokio::test]
async fn backends_that_are_killed_at_random_cost_no_acknowledged_task() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let killer = async {
        for _ in 0..30 {
            db.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity
                  where application_name like 'taskwire%' and datname = current_database()
                  order by random() limit 2",
            )
            .await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let creator = async {
        let (mut acknowledged, mut refused) = (Vec::new(), 0);
        while acknowledged.len() < 300 {
            let answer = replica.post("/v1/tasks", json!({"title": "x"})).await;
            match answer.status {
                201 => acknowledged.push(answer.json()["id"].as_str().unwrap().to_owned()),
                503 => refused += 1,
                _ => panic!("{answer:?}"),
            }
            assert!(refused < 1_000, "it never heals");
        }
        acknowledged
    };
    let ((), acknowledged) = tokio::join!(killer, creator);
    for id in acknowledged {
        assert_eq!(db.value(&format!("select count(*) from tasks where id = '{id}'")).await, "1");
    }
    assert_eq!(
        db.value("select count(*) from pg_stat_activity where state like 'idle in transaction%' and application_name like 'taskwire%'").await,
        "0"
    );
}

#[tokio::test]
async fn an_outage_longer_than_a_lease_costs_a_connected_worker_none_of_its_claims() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--lease-seconds", "1"]).await;
    let mut stream = replica.stream("worker_id=w").await;
    let id = replica.create(json!({"title": "x", "max_attempts": 1})).await;
    assert_eq!(stream.announced().await, id);
    replica.claim(&id, "w").await.expect(200);
    // As after a minute without Postgres: every sign of life is old, and the lease has lapsed.
    db.execute(
        "begin;
         lock table replicas in exclusive mode;
         update replicas set last_seen_at = now() - interval '1 min';
         update workers set last_seen_at = now() - interval '1 min';
         update tasks set lease_expires_at = now() - interval '50 s';
         commit",
    )
    .await;
    eventually("the lease moves on", async || {
        let left = db.value("select lease_expires_at > now() from tasks").await;
        let task = replica.task(&id).await;
        assert_eq!((&task["status"], &task["claim_epoch"]), (&json!("running"), &json!(1)));
        (left == "true").then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_row_that_somebody_has_locked_holds_up_nobody_else() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let mut ids = Vec::new();
    for n in 0..20 {
        let id = replica.create(json!({"title": format!("{n}")})).await;
        replica.claim(&id, "w").await.expect(200);
        ids.push(id);
    }
    let unclaimed = replica.create(json!({"title": "unclaimed"})).await;
    let mut operator = db.pool.begin().await.unwrap();
    sqlx::query(sqlx::AssertSqlSafe(format!(
        "select 1 from tasks where id in ('{}', '{unclaimed}') for update",
        ids[0]
    )))
    .execute(&mut *operator)
    .await
    .unwrap();

    let begun = Instant::now();
    let lost = replica.claim(&unclaimed, "w").await;
    assert_eq!((lost.status, lost.problem().as_str()), (409, "already_claimed"));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());

    let finish = ids.iter().map(|id| replica.finish("complete", id, "w", json!({})));
    let mut answers = futures_util::future::join_all(finish).await;
    let locked = answers.remove(0);
    assert_eq!((locked.status, locked.problem().as_str()), (503, "contended"));
    for answer in answers {
        answer.expect(200);
    }
    operator.rollback().await.unwrap();
    replica.finish("complete", &ids[0], "w", json!({})).await.expect(200);
}

#[tokio::test]
async fn replicas_that_serve_the_same_workers_do_not_deadlock() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    // Everybody reconnects to the other replica again and again, and calls meanwhile.
    let worker = async |n: usize| {
        for round in 0..6 {
            let stream = replicas[(n + round) % 2].stream(&format!("worker_id=w-{n}")).await;
            let path = format!("/v1/agent/workers/w-{n}/heartbeat");
            replicas[(n + round + 1) % 2].post(&path, json!({})).await.expect(200);
            drop(stream);
        }
    };
    futures_util::future::join_all((0..40).map(worker)).await;
    let sql = "select deadlocks from pg_stat_database where datname = current_database()";
    assert_eq!(db.value(sql).await, "0");
}
