//! P11: no session of ours holds VACUUM back, or the queue of notifications.

use std::time::Duration;

use serde_json::json;

use crate::support::{Replica, TestDb};

/// How often sessions are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[tokio::test]
async fn p11_under_a_burst_no_session_of_ours_keeps_an_old_snapshot_or_waits_for_its_client() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let _stream = replica.stream("worker_id=w").await;
    let load = async {
        for round in 0..5 {
            // Far more bytes of notifications than a socket holds: a listener that did anything but
            // read would be found waiting.
            db.execute(&format!(
                "insert into tasks (title, codebase_id)
                 select 'x', 'codebase-' || {round} from generate_series(1, 1500)"
            ))
            .await;
            db.execute(
                "select count(pg_notify('taskwire', repeat('x', 7000) || n)) from generate_series(1, 3000) n",
            )
            .await;
            let calls = (0..20).map(|_| replica.post("/v1/tasks", json!({"title": "x"})));
            for answer in futures_util::future::join_all(calls).await {
                answer.expect(201);
            }
        }
    };
    let watch = async {
        // A session that is seen like this twelve times in a row has been so for more than a second.
        let (mut stuck, mut worst) = (0, 0);
        loop {
            let bad = db
                .value(
                    "select count(*) from pg_stat_activity
                      where application_name like 'taskwire%' and datname = current_database()
                        and (wait_event = 'ClientWrite' and state_change < now() - interval '1 s'
                             or state like 'idle in transaction%' and state_change < now() - interval '1 s'
                             or backend_xmin is not null and xact_start < now() - interval '5 s')",
                )
                .await;
            stuck = if bad == "0" { 0 } else { stuck + 1 };
            worst = worst.max(stuck);
            assert!(worst < 12, "a session of ours is stuck");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    tokio::select! {
        () = load => {}
        () = watch => {}
    }
}
