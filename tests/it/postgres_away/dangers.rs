//! P24: it tells when it is not safe.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Replica, TestDb, eventually};

/// Within this a danger is named, in `/readyz` and in the log.
const NAMED_WITHIN: Duration = Duration::from_secs(10);

async fn is_warned(replica: &Replica, of: &str) {
    let begun = Instant::now();
    eventually(&format!("it warns of {of}"), async || {
        let ready = replica.get("/readyz").await.expect(200);
        let named = ready["warnings"].as_array().unwrap().iter();
        let in_ready = named.filter(|text| text.as_str().unwrap().contains(of)).count() == 1;
        let in_log = replica.log().contains(&format!("not safe: {of}"));
        (in_ready && in_log).then_some(())
    })
    .await;
    assert!(begun.elapsed() < NAMED_WITHIN, "{:?}", begun.elapsed());
}

async fn is_safe_again(replica: &Replica, from: &str) {
    eventually(&format!("it is safe from {from}"), async || {
        let ready = replica.get("/readyz").await.expect(200);
        let said = format!("safe again, this has ended: {from}");
        (!ready["warnings"].to_string().contains(from) && replica.log().contains(&said))
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn p24_a_missing_trigger_is_named_and_its_return_too() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let ready = replica.get("/readyz").await.expect(200);
    assert!(!ready["warnings"].to_string().contains("trigger"), "{ready}");
    db.execute("alter table tasks disable trigger tasks_notify_inserted").await;
    is_warned(&replica, "trigger tasks_notify_inserted").await;
    let metrics = replica.get("/metrics").await.text;
    assert!(metrics.contains("taskwire_dangers{what=\"trigger_off\"} 1"), "{metrics}");
    db.execute("alter table tasks enable trigger tasks_notify_inserted").await;
    is_safe_again(&replica, "trigger tasks_notify_inserted").await;
    let metrics = replica.get("/metrics").await.text;
    assert!(metrics.contains("taskwire_dangers{what=\"trigger_off\"} 0"), "{metrics}");
}

#[tokio::test]
async fn p24_without_synchronous_commit_it_warns_and_commits_durably_all_the_same() {
    let db = TestDb::new().await;
    // What each of our commits was made with, noted by Postgres itself.
    let replica = Replica::start(&db).await;
    db.execute(
        "create table seen (setting text);
         create function note() returns trigger language plpgsql as $$ begin
             insert into seen values (current_setting('synchronous_commit')); return null; end $$;
         create trigger note after insert on tasks for each statement execute function note()",
    )
    .await;
    db.execute(&format!("alter database {} set synchronous_commit = off", db.name)).await;
    // The setting of a database is that of its new sessions.
    let restarted = Replica::start(&db).await;
    is_warned(&restarted, "synchronous_commit is off").await;
    restarted.create(json!({"title": "x"})).await;
    replica.create(json!({"title": "x"})).await;
    assert_eq!(db.value("select string_agg(distinct setting, ',') from seen").await, "on");

    db.execute(&format!("alter database {} set synchronous_commit = remote_apply", db.name)).await;
    let third = Replica::start(&db).await;
    third.create(json!({"title": "x"})).await;
    let sql = "select string_agg(distinct setting, ',' order by setting) from seen";
    assert_eq!(db.value(sql).await, "on,remote_apply");
}

#[tokio::test]
async fn f13_a_queue_of_notifications_that_fills_up_is_named_before_it_is_full() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    // LISTEN takes effect at commit; the transaction after it holds the queue's end where it is.
    let mut foreign = db.pool.acquire().await.unwrap();
    for sql in ["listen somewhere", "begin", "select 1"] {
        sqlx::raw_sql(sql).execute(&mut *foreign).await.unwrap();
    }
    // A hundredth of 8 GB, in messages of nearly the largest size, all different.
    let fill = "select count(pg_notify('somewhere', repeat('x', 7900) || n)) from generate_series(1, 11500) n";
    db.execute(fill).await;
    is_warned(&replica, "the notification queue is").await;
    let metrics = replica.get("/metrics").await.text;
    assert!(metrics.contains("taskwire_dangers{what=\"notification_queue\"} 1"), "{metrics}");
    // Tasks are announced all the same.
    let mut stream = replica.stream("worker_id=w").await;
    let id = replica.create(json!({"title": "x"})).await;
    assert_eq!(stream.announced().await, id);
    let mut foreign = foreign.detach();
    sqlx::raw_sql("rollback; unlisten *").execute(&mut foreign).await.unwrap();
    drop(foreign);
    // The queue's end moves on with the next notification.
    eventually("the queue is empty again", async || {
        replica.create(json!({"title": "x"})).await;
        let ready = replica.get("/readyz").await.expect(200);
        (!ready["warnings"].to_string().contains("queue")).then_some(())
    })
    .await;
}
