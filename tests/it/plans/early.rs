//! Plans that were made while next to nothing was there, where to read all is cheapest.

use serde_json::json;
use sqlx::{Connection, Executor, PgConnection, Row};

use super::run;
use crate::support::{Replica, TestDb, eventually};

async fn backends(db: &TestDb) -> Vec<String> {
    let pids = db
        .value(
            "select coalesce(string_agg(pid::text, ' '), '') from pg_stat_activity
              where application_name = 'taskwire' and datname = current_database()",
        )
        .await;
    pids.split_whitespace().map(str::to_owned).collect()
}

#[tokio::test]
async fn plans_are_made_anew_when_the_tables_have_outgrown_them() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    // No help from autovacuum, whose statistics would have the same effect, later.
    db.execute("alter table tasks set (autovacuum_enabled = off)").await;
    let early = replica.create(json!({"title": "x"})).await;
    let before = backends(&db).await;
    assert!(!before.is_empty());
    db.execute("insert into tasks (title) select 'x' from generate_series(1, 5000)").await;
    eventually("all connections are new", async || {
        replica.task(&early).await;
        let now = backends(&db).await;
        (!now.is_empty() && now.iter().all(|pid| !before.contains(pid))).then_some(())
    })
    .await;
}

/// Of two calls for one claim in one statement the first one counts, which rests on the order in which the
/// plan reads: with five rows the planner would rather join otherwise.
#[tokio::test]
async fn of_two_calls_for_one_claim_the_first_one_counts_however_few_tasks_there_are() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        let id = replica.create(json!({"title": "x"})).await;
        replica.claim(&id, "w").await.expect(200);
        ids.push(id);
    }
    db.execute("analyze").await;
    let mut postgres = PgConnection::connect(&db.url).await.unwrap();
    let sql = std::fs::read_to_string("src/store/sql/task_finish.sql").unwrap();
    run(&mut postgres, "set plan_cache_mode = force_generic_plan").await;
    run(&mut postgres, &format!("prepare finish as {sql}")).await;
    for (seqscan, id) in ["off", "on"].iter().zip(&ids) {
        run(&mut postgres, &format!("set enable_seqscan = {seqscan}; discard plans")).await;
        let arguments = format!(
            "'{{{id},{id}}}', '{{w,w}}', '{{1,1}}', '{{complete,fail}}', '{{1,null}}', '{{null,late}}', '{{f,f}}', '{{null,null}}'"
        );
        let execute = sqlx::AssertSqlSafe(format!("execute finish ({arguments})"));
        let rows = postgres.fetch_all(sqlx::raw_sql(execute)).await.unwrap();
        let ended: Vec<_> =
            rows.iter().map(|row| (row.get::<i64, _>(0), row.get::<String, _>(1))).collect();
        assert_eq!(ended, [(1, "completed".to_owned())], "enable_seqscan = {seqscan}");
        assert_eq!(replica.task(id).await["error"], json!(null));
    }
}
