//! The schema for people who type SQL, and how it comes to be.

use std::process::Command;

use serde_json::json;

use crate::support::{Replica, TestDb};

/// The files that have landed, by the checksum that refinery keeps of each. Never changed, only
/// added to: a database out there has run them.
const LANDED: [(i32, &str); 12] = [
    (1, "17421709084033759846"),
    (2, "13674422163204194306"),
    (3, "1888907479117543489"),
    (4, "11449814694246739302"),
    (5, "12867428236941616478"),
    (6, "14290086114228118506"),
    (7, "3282594855275097259"),
    (8, "15252371656726493050"),
    (9, "1073531663962376173"),
    (10, "15774728715024815982"),
    (11, "16449882769815574990"),
    (12, "3994015798781998417"),
];

#[tokio::test]
async fn a_title_is_all_that_an_insert_needs() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    db.execute("insert into tasks (title) values ('x')").await;
    let id = db.value("select id from tasks").await;
    let task = replica.task(&id).await;
    assert_eq!((&task["status"], &task["codebase_id"]), (&json!("pending"), &json!("global")));
    assert_eq!((&task["max_attempts"], &task["metadata"]), (&json!(3), &json!({})));
}

#[tokio::test]
async fn an_impossible_row_cannot_be_written_and_the_constraint_says_why() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let id = replica.create(json!({"title": "x"})).await;
    replica.claim(&id, "w").await.expect(200);
    db.execute("insert into tasks (title) values ('pending')").await;
    for (sql, constraint) in [
        ("insert into tasks (title) values ('')", "tasks_title_length"),
        ("insert into tasks (title, codebase_id) values ('x', 'a b')", "tasks_codebase_is_valid"),
        (
            "insert into tasks (title, required_capabilities) values ('x', '{a b}')",
            "tasks_capabilities_are_valid",
        ),
        ("insert into tasks (title, metadata) values ('x', '[]')", "tasks_metadata_is_object"),
        ("insert into tasks (title, status) values ('x', 'done')", "tasks_status_is_known"),
        ("insert into tasks (title, max_attempts) values ('x', 0)", "tasks_max_attempts_range"),
        (
            "update tasks set claimed_by = 'v' where status = 'running'",
            "tasks_claim_is_not_handed_over",
        ),
        (
            "update tasks set claimed_by = 'v' where status = 'pending'",
            "tasks_pending_is_unclaimed",
        ),
        ("update tasks set claim_epoch = 0 where status = 'running'", "tasks_claim_raises_epoch"),
        (
            "update tasks set claim_epoch = claim_epoch + 1 where status = 'running'",
            "tasks_claim_raises_epoch",
        ),
        (
            "update tasks set status = 'running', claimed_by = 'v', claimed_at = now(),
                    lease_expires_at = now() + interval '1 minute' where status = 'pending'",
            "tasks_claim_raises_epoch",
        ),
        (
            "update tasks set status = 'running', claimed_by = 'v', claim_epoch = claim_epoch + 1
              where status = 'pending'",
            "tasks_running_is_claimed",
        ),
        (
            "update tasks set finished_at = now() where status = 'pending'",
            "tasks_finished_has_time",
        ),
        (
            "update tasks set claim_outcome = 'vanished' where status = 'pending'",
            "tasks_claim_outcome_is_known",
        ),
        ("update workers set codebases = '{a b}'", "workers_codebases_are_valid"),
        // Lists that Postgres knows and nobody could read.
        (
            "insert into tasks (title, required_capabilities) values ('x', '{{a,b},{c,d}}')",
            "tasks_capabilities_are_valid",
        ),
        (
            "insert into tasks (title, required_capabilities) values ('x', '[0:1]={a,b}')",
            "tasks_capabilities_are_valid",
        ),
        ("update workers set codebases = '{{a,b}}'", "workers_codebases_are_valid"),
        ("update workers set capabilities = '{{a},{b}}'", "workers_capabilities_are_valid"),
    ] {
        let error = sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&db.pool).await.expect_err(sql);
        let found =
            error.as_database_error().and_then(|error| error.constraint()).map(str::to_owned);
        let known = [constraint, "tasks_running_has_lease"];
        assert!(found.as_deref().is_some_and(|found| known.contains(&found)), "{sql}: {error}");
    }
}

#[tokio::test]
async fn every_table_column_and_function_is_explained() {
    let db = TestDb::new().await;
    let _schema = Replica::start(&db).await;
    let unexplained = db
        .value(
            "select string_agg(what, ', ') from (
               select c.relname || '.' || a.attname as what
                 from pg_class c join pg_attribute a on a.attrelid = c.oid
                where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v')
                  and c.relname <> 'refinery_schema_history'
                  and a.attnum > 0 and not a.attisdropped and col_description(c.oid, a.attnum) is null
               union all
               select relname from pg_class
                where relnamespace = 'public'::regnamespace and relkind in ('r', 'v')
                  and relname <> 'refinery_schema_history' and obj_description(oid, 'pg_class') is null
               union all
               select proname from pg_proc
                where pronamespace = 'public'::regnamespace and obj_description(oid, 'pg_proc') is null
             ) as missing",
        )
        .await;
    assert_eq!(unexplained, "");
}

#[tokio::test]
async fn many_replicas_may_start_at_once_on_an_empty_database() {
    let db = TestDb::new().await;
    let replicas = futures_util::future::join_all((0..6).map(|_| Replica::start(&db))).await;
    let migrators =
        replicas.iter().filter(|replica| replica.log().contains("migration applied")).count();
    assert_eq!(migrators, 1);
    assert_eq!(db.value("select count(*) from replicas").await, "6");
}

/// Runs `taskwire migrate` on a database; whether it succeeded, and what it said.
pub fn migrate(db: &TestDb) -> (bool, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_taskwire"))
        .args(["migrate", "--database-url", &db.url])
        .output()
        .unwrap();
    (done.status.success(), String::from_utf8(done.stderr).unwrap())
}

#[tokio::test]
async fn migrations_run_once_and_a_history_that_does_not_fit_is_refused_in_a_sentence() {
    let db = TestDb::new().await;
    let (ok, said) = migrate(&db);
    assert!(ok && said.contains("migration applied: V1__"), "{said}");
    let (ok, said) = migrate(&db);
    assert!(ok && said.contains("up to date"), "{said}");
    for (edit, sentence) in [
        (
            "update refinery_schema_history set applied_on = 'last week' where version = 1",
            "edited by hand",
        ),
        ("update refinery_schema_history set checksum = null where version = 1", "edited by hand"),
        ("update refinery_schema_history set checksum = '1' where version = 1", "V1__"),
        (
            "insert into refinery_schema_history values (9999, 'x', now()::text, '1')",
            "run the newer release",
        ),
    ] {
        db.execute("create table if not exists saved as select * from refinery_schema_history")
            .await;
        db.execute(edit).await;
        let (ok, said) = migrate(&db);
        assert!(!ok && said.contains(sentence) && !said.contains("panicked"), "{edit}: {said}");
        db.execute("truncate refinery_schema_history; insert into refinery_schema_history select * from saved").await;
    }
    assert!(migrate(&db).0);
}

#[tokio::test]
async fn a_migration_that_has_landed_is_never_changed() {
    let db = TestDb::new().await;
    assert!(migrate(&db).0);
    for (version, checksum) in LANDED {
        let sql = format!("select checksum from refinery_schema_history where version = {version}");
        assert_eq!(db.value(&sql).await, checksum, "V{version} was edited: add a new file instead");
    }
    let count = db.value("select count(*) from refinery_schema_history").await;
    assert_eq!(count, LANDED.len().to_string(), "add the new file's checksum to LANDED");
}
