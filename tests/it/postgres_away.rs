//! E3: while Postgres is away writes are refused fast, streams stay open, and nothing is lost.

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
