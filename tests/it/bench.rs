//! `taskwire bench` in its smallest sizes: it measures, tells, and leaves nothing behind. What its figures
//! are is not for tests.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{PATIENCE, TestDb, eventually};

/// How long a run may take on a busy machine.
const RUN_DEADLINE: Duration = Duration::from_mins(4);

/// A file that is removed at the end.
struct Results(PathBuf);

impl Results {
    fn new(name: &str) -> Self {
        let file = format!("taskwire-test-{}-{name}.json", std::process::id());
        Self(std::env::temp_dir().join(file))
    }

    fn read(&self) -> Value {
        serde_json::from_str(&fs::read_to_string(&self.0).unwrap()).unwrap()
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn bench(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_taskwire"));
    command.arg("bench").args(args).arg("--quick").stdin(Stdio::null());
    command
}

/// Runs it to its end, and gives what it printed.
fn run(mut command: Command) -> String {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (pid, begun) = (child.id().to_string(), Instant::now());
    let ended = std::thread::spawn(move || child.wait_with_output().unwrap());
    while !ended.is_finished() {
        if begun.elapsed() > RUN_DEADLINE {
            let _ = Command::new("kill").arg(&pid).status();
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = ended.join().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Databases of this run of the benchmark.
async fn databases(db: &TestDb, pid: u32) -> String {
    db.value(&format!(
        "select count(*) from pg_database where datname like 'taskwire_bench_{pid}_%'"
    ))
    .await
}

#[tokio::test]
async fn every_measurement_has_figures_with_their_floors_targets_and_units() {
    let db = TestDb::new().await;
    let results = Results::new("all");
    let mut command = bench(&["all", "--json", results.0.to_str().unwrap()]);
    command.env("DATABASE_URL", &db.url);
    let table = tokio::task::spawn_blocking(|| run(command)).await.unwrap();
    let found = results.read();
    assert_eq!(found["taskwire"], env!("CARGO_PKG_VERSION"));
    assert!(found["machine"]["cores"].as_u64().is_some_and(|cores| cores > 0), "{found}");
    assert!(!found["postgres"].as_str().unwrap().is_empty());
    let rows = found["rows"].as_array().unwrap();
    let mut measured = HashSet::new();
    for row in rows {
        let what = row["what"].as_str().unwrap();
        assert!(!row["unit"].as_str().unwrap().is_empty(), "{row}");
        assert!(table.contains(what), "{what} is not in: {table}");
        if row["value"].is_null() {
            assert!(row["note"].is_string(), "{row} does not say why it has no figure");
        } else {
            assert!(row["value"].as_f64().unwrap() >= 0.0, "{row}");
            measured.insert(row["measurement"].as_str().unwrap());
        }
        // A target is one of a ratio to what was measured in the same run, or of the value itself.
        if row["target"].is_object() && row["target_is_absolute"] == false {
            assert!(row["value"].is_null() || row["ratio"].is_number(), "{row}");
        }
    }
    for name in taskwire::bench::MEASUREMENTS {
        assert!(measured.contains(name), "{name} has no figure: {table}");
    }
}

#[tokio::test]
async fn it_starts_a_postgres_of_its_own_and_takes_it_away_again() {
    let results = Results::new("own");
    let mut command = bench(&["push", "--json", results.0.to_str().unwrap()]);
    command.env_remove("DATABASE_URL");
    // Nobody else puts anything there.
    let home = std::env::temp_dir().join(format!("taskwire-test-{}-home", std::process::id()));
    fs::create_dir(&home).unwrap();
    command.env("TMPDIR", &home);
    tokio::task::spawn_blocking(|| run(command)).await.unwrap();
    assert!(results.read()["rows"].as_array().unwrap().len() > 2);
    fs::remove_dir(&home).expect("it left nothing there");
}

#[tokio::test]
async fn ctrl_c_ends_its_replicas_and_drops_its_databases() {
    let db = TestDb::new().await;
    let mut command = bench(&["push", "--seconds", "60"]);
    command.env("DATABASE_URL", &db.url).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let pid = child.id();
    let connected = "select count(*) from pg_stat_activity where application_name = 'taskwire listener' \
                     and datname like 'taskwire_bench_";
    eventually("two replicas listen", async || {
        let count = db.value(&format!("{connected}{pid}_%'")).await;
        (count == "2").then_some(())
    })
    .await;
    assert!(Command::new("kill").args(["-s", "INT", &pid.to_string()]).status().unwrap().success());
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > PATIENCE * 6 {
            let _ = child.kill();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(status.code(), Some(1));
    assert_eq!(databases(&db, pid).await, "0");
    assert_eq!(db.value(&format!("{connected}{pid}_%'")).await, "0");
}

#[tokio::test]
async fn a_killed_benchmark_takes_its_replicas_with_it() {
    let db = TestDb::new().await;
    let mut command = bench(&["push", "--seconds", "60"]);
    command.env("DATABASE_URL", &db.url).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let pid = child.id();
    let connected = format!(
        "select count(*) from pg_stat_activity where application_name = 'taskwire listener' \
         and datname like 'taskwire_bench_{pid}_%'"
    );
    eventually("two replicas listen", async || (db.value(&connected).await == "2").then_some(()))
        .await;
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("its replicas are gone", async || (db.value(&connected).await == "0").then_some(()))
        .await;
    // Nobody was left to drop them.
    for number in 0..8 {
        let drop = format!("drop database if exists taskwire_bench_{pid}_{number} with (force)");
        db.execute(&drop).await;
    }
    let _ = fs::remove_dir_all(std::env::temp_dir().join(format!("taskwire-bench-{pid}")));
}

#[tokio::test]
async fn the_row_for_the_table_of_peers_has_what_every_peer_has() {
    let db = TestDb::new().await;
    let mut command = bench(&["peers-row", "--json", "--drained", "200"]);
    command.env("DATABASE_URL", &db.url);
    let printed = tokio::task::spawn_blocking(|| run(command)).await.unwrap();
    let row: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(
        (&row["name"], &row["version"]),
        (&"taskwire".into(), &env!("CARGO_PKG_VERSION").into())
    );
    for figure in [
        &row["idle_latency_ms"]["p50"],
        &row["idle_latency_ms"]["p99"],
        &row["enqueue_per_s"]["c32"],
        &row["enqueue_per_s"]["c128"],
        &row["enqueue_per_s"]["batch100"],
        &row["drain_per_s"],
    ] {
        assert!(figure.as_f64().is_some_and(|figure| figure > 0.0), "{row}");
    }
    assert!(row["settings"].is_string() && row["notes"].is_string());
}
