//! What each hot statement costs on a table that has seen a year: the plans are part of the promises.
//!
//! What is explained is the file that runs, prepared as sqlx prepares it and under the settings of the
//! server's sessions: with the generic plan, but for listings.

mod early;
mod statements;

use std::fs;

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row};

use crate::schema::migrate;
use crate::support::TestDb;
use statements::{NOT_HOT, STATEMENTS, Statement};

/// No hot statement reads one of these from end to end.
const LARGE: [&str; 3] = ["tasks", "attempts", "heartbeats"];

/// What Postgres counted in this transaction, triggers, functions and the planner's own looks included:
/// blocks touched of all tables and indexes, and scans of large tables from end to end.
const COUNTERS: &str = "
    select sum(pg_stat_get_xact_blocks_fetched(oid))::bigint,
           sum(pg_stat_get_xact_numscans(oid)) filter (where relname in ('tasks', 'attempts', 'heartbeats'))::bigint
      from pg_class
     where relkind in ('r', 'i', 't') and relnamespace in ('public'::regnamespace, 'pg_toast'::regnamespace)";

/// What one execution did.
struct Measured {
    plan: Value,
    buffers: u64,
    /// Also those of triggers and functions, which a plan does not show.
    full_scans: u64,
}

#[test]
fn every_statement_is_either_measured_or_said_not_to_be_hot() {
    let known = |file: &str| {
        STATEMENTS.iter().any(|statement| statement.file == file)
            || NOT_HOT.iter().any(|(name, _)| *name == file)
    };
    for entry in fs::read_dir("src/store/sql").unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_stem().unwrap().to_str().unwrap().to_owned();
        assert!(known(&file), "{file}: add it to STATEMENTS, or to NOT_HOT with the reason");
    }
}

#[tokio::test]
async fn no_hot_statement_costs_more_with_a_million_finished_tasks() {
    let db = TestDb::new().await;
    let (ok, said) = migrate(&db);
    assert!(ok, "{said}");
    let mut postgres = PgConnection::connect(&db.url).await.unwrap();
    let begun = std::time::Instant::now();
    run(&mut postgres, include_str!("plans/data.sql")).await;
    run(&mut postgres, "vacuum analyze").await;
    eprintln!("loaded in {:.1} s", begun.elapsed().as_secs_f64());

    let mut bad = Vec::new();
    for statement in STATEMENTS {
        // Through a pooler, too: there it is prepared for one time, and by the same settings.
        let mode = statement.plan_cache_mode();
        let measured = measure(&mut postgres, statement, mode).await;
        eprintln!("{}", line(statement, mode, &measured));
        let faults = faults(statement, &measured);
        if !faults.is_empty() {
            let text = explain(&mut postgres, statement, mode).await;
            bad.push(format!(
                "{} with {} ({mode}): {}\n{text}",
                statement.file,
                statement.what,
                faults.join("; ")
            ));
        }
    }
    assert!(bad.is_empty(), "{} bad plans\n\n{}", bad.len(), bad.join("\n\n"));
}

/// Executes a statement, in a transaction that is rolled back.
async fn measure(postgres: &mut PgConnection, statement: &Statement, mode: &str) -> Measured {
    prepare(postgres, statement, mode).await;
    let (blocks_before, scans_before) = counters(postgres).await;
    let sql =
        format!("explain (analyze, buffers, format json) execute s ({})", statement.arguments);
    let json: Value = postgres.fetch_one(sqlx::raw_sql(AssertSqlSafe(sql))).await.unwrap().get(0);
    let (blocks, scans) = counters(postgres).await;
    run(postgres, "rollback; deallocate s").await;
    Measured {
        plan: json[0].clone(),
        buffers: blocks - blocks_before,
        full_scans: scans - scans_before,
    }
}

/// The same as text, for people.
async fn explain(postgres: &mut PgConnection, statement: &Statement, mode: &str) -> String {
    prepare(postgres, statement, mode).await;
    let sql = format!("explain (analyze, buffers) execute s ({})", statement.arguments);
    let rows = postgres.fetch_all(sqlx::raw_sql(AssertSqlSafe(sql))).await.unwrap();
    run(postgres, "rollback; deallocate s").await;
    rows.iter().map(|row| row.get::<String, _>(0)).collect::<Vec<_>>().join("\n")
}

/// Begins a transaction and prepares `s` in it, under the settings of the server's sessions.
async fn prepare(postgres: &mut PgConnection, statement: &Statement, mode: &str) {
    let sql = fs::read_to_string(format!("src/store/sql/{}.sql", statement.file)).unwrap();
    let seqscan = if statement.is_planned_anew() { "on" } else { "off" };
    run(
        postgres,
        &format!(
            "begin; set local jit = off; set local max_parallel_workers_per_gather = 0; \
             set local enable_seqscan = {seqscan}; set local plan_cache_mode = {mode}"
        ),
    )
    .await;
    run(postgres, &format!("prepare s as {sql}")).await;
}

async fn run(postgres: &mut PgConnection, sql: &str) {
    let done = postgres.execute(sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))).await;
    done.unwrap_or_else(|error| panic!("{error}: {sql}"));
}

async fn counters(postgres: &mut PgConnection) -> (u64, u64) {
    let row = postgres.fetch_one(sqlx::raw_sql(COUNTERS)).await.unwrap();
    let number = |at| u64::try_from(row.get::<i64, _>(at)).unwrap();
    (number(0), number(1))
}

/// What is wrong with an execution, in words.
fn faults(statement: &Statement, measured: &Measured) -> Vec<String> {
    let mut faults = Vec::new();
    let mut thrown_away = 0;
    walk(&measured.plan["Plan"], &mut |node| {
        let kind = node["Node Type"].as_str().unwrap_or_default();
        let table = node["Relation Name"].as_str().unwrap_or_default();
        if kind == "Seq Scan" && LARGE.contains(&table) {
            faults.push(format!("Seq Scan on {table}, filter {}", node["Filter"]));
        }
        if kind == "Sort" && node["Plans"][0]["Actual Rows"].as_u64() > Some(statement.rows_max) {
            faults.push(format!(
                "sorts {} rows by {}",
                node["Plans"][0]["Actual Rows"], node["Sort Key"]
            ));
        }
        let removed: u64 = ["Filter", "Join Filter", "Index Recheck"]
            .iter()
            .filter_map(|by| node[format!("Rows Removed by {by}")].as_u64())
            .sum();
        thrown_away += removed * node["Actual Loops"].as_u64().unwrap_or_default();
    });
    if thrown_away > statement.rows_max {
        faults.push(format!("throws {thrown_away} rows away, more than {}", statement.rows_max));
    }
    if measured.full_scans > 0 {
        faults.push("reads a large table from end to end, maybe in a trigger or function".into());
    }
    if measured.buffers > statement.buffers_max() {
        let (touched, most) = (measured.buffers, statement.buffers_max());
        faults.push(format!("touches {touched} buffers, more than {most}"));
    }
    faults
}

fn walk(node: &Value, visit: &mut impl FnMut(&Value)) {
    visit(node);
    for child in node["Plans"].as_array().into_iter().flatten() {
        walk(child, visit);
    }
}

/// What a run with `--nocapture` shows of each statement.
fn line(statement: &Statement, mode: &str, measured: &Measured) -> String {
    let plan = &measured.plan;
    let triggers: f64 =
        plan["Triggers"].as_array().into_iter().flatten().filter_map(|t| t["Time"].as_f64()).sum();
    format!(
        "{:<22} {:<34} {:<18} {:>6} of {:>6} buffers {:>9.3} ms, {:>7.3} ms planning, {triggers:>7.3} ms triggers",
        statement.file,
        statement.what,
        mode,
        measured.buffers,
        statement.buffers_max(),
        plan["Execution Time"].as_f64().unwrap_or_default(),
        plan["Planning Time"].as_f64().unwrap_or_default(),
    )
}
