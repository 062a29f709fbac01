//! The program itself: its own Postgres, its settings, and how it says what is wrong.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::support::{PATIENCE, Replica, TestDb, eventually};

fn taskwire(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_taskwire"));
    command.args(args).env_remove("DATABASE_URL");
    command
}

fn output(mut command: Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

/// A folder of its own under the target folder.
fn folder(name: &str) -> std::path::PathBuf {
    let path = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("{name} {}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).unwrap();
    path
}

#[tokio::test]
async fn without_a_database_url_it_starts_its_own_postgres_and_a_second_one_joins() {
    let home = folder("own postgres");
    let serve = || {
        let mut command = taskwire(&["serve", "--bind", "127.0.0.1:0", "--drain-seconds", "1"]);
        command.current_dir(&home);
        command
    };
    let mut first = Replica::spawn(serve()).await;
    let second = Replica::spawn(serve()).await;
    let mut stream = second.stream("worker_id=w").await;
    let id = first.create(json!({"title": "over one Postgres"})).await;
    assert_eq!(stream.announced().await, id);

    // The one that started it may go; the other one goes on.
    first.signal("TERM");
    assert!(first.ends_within(PATIENCE).await.is_some_and(|status| status.success()));
    second.claim(&id, "w").await.expect(200);
    let postmaster =
        std::fs::read_to_string(home.join(".taskwire/postgres/postmaster.pid")).unwrap();
    let postmaster = postmaster.lines().next().unwrap().to_owned();

    // The last one is killed without a word: its Postgres ends all the same.
    second.kill();
    eventually("the own Postgres ends", async || {
        (!std::path::Path::new(&format!("/proc/{postmaster}")).exists()).then_some(())
    })
    .await;

    // And what was acknowledged is there when it starts again.
    let third = Replica::spawn(serve()).await;
    assert_eq!(third.task(&id).await["claimed_by"], "w");
    drop(third);
    eventually("its Postgres ends too", async || {
        (!home.join(".taskwire/postgres/postmaster.pid").exists()).then_some(())
    })
    .await;
    std::fs::remove_dir_all(&home).unwrap();
}

#[test]
fn every_wrong_setting_stops_the_start_with_a_sentence_that_names_it() {
    let mut command = taskwire(&["serve", "--worker-sse-window", "0"]);
    command.env("WORKER_SSE_KEEPALIVE", "soon").env("TASKWIRE_BIND", "somewhere");
    let done = output(command);
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(!done.status.success());
    for name in ["WORKER_SSE_WINDOW", "WORKER_SSE_KEEPALIVE", "TASKWIRE_BIND"] {
        assert!(said.contains(name), "{name}: {said}");
    }
}

#[tokio::test]
async fn a_taken_address_and_a_wrong_database_are_told_in_a_sentence_without_the_password() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let taken = replica.url.strip_prefix("http://").unwrap();
    let done = output(taskwire(&["serve", "--bind", taken, "--database-url", &db.url]));
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(!done.status.success() && said.contains("is in use"), "{said}");

    let url = format!("{}_missing", db.url.split('?').next().unwrap());
    let done = output(taskwire(&["serve", "--bind", "127.0.0.1:0", "--database-url", &url]));
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(!done.status.success() && said.contains("does not exist"), "{said}");
    let password = db.url.split(['/', '@', ':']).nth(4).unwrap_or_default();
    assert!(password.is_empty() || !said.contains(password), "{said}");
}

#[tokio::test]
async fn logs_are_json_when_asked_for_and_name_streams_trigger_and_listener() {
    let db = TestDb::new().await;
    let mut command = taskwire(&["serve", "--bind", "127.0.0.1:0", "--database-url", &db.url]);
    let text = Replica::start(&db).await;
    drop(text.stream("worker_id=logged").await);
    eventually("the stream's end is logged", async || {
        text.log().contains("stream closed").then_some(())
    })
    .await;
    let log = text.log();
    for what in ["task creation hook is on", "listener on", "stream opened", "stream closed"] {
        let line =
            log.lines().find(|line| line.contains(what)).unwrap_or_else(|| panic!("{what}: {log}"));
        assert!(line.contains("worker_sse"), "{line}");
    }
    let mut json = command
        .args(["--log-format", "json"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let _ = Command::new("kill").args(["-s", "TERM", &json.id().to_string()]).status();
    let log = std::io::read_to_string(json.stderr.take().unwrap()).unwrap();
    let _ = json.wait();
    for line in log.lines() {
        let line: serde_json::Value =
            serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        assert!(line["message"].is_string() && line["target"].is_string(), "{line}");
    }
    assert!(log.contains("listener on"), "{log}");
}

#[tokio::test]
async fn a_second_signal_ends_a_drain_at_once() {
    let db = TestDb::new().await;
    let mut replica = Replica::start_with(&db, &["--drain-seconds", "600"]).await;
    let mut streams = Vec::new();
    for n in 0..3 {
        streams.push(replica.stream(&format!("worker_id=w-{n}")).await);
    }
    replica.signal("TERM");
    eventually("readiness is off", async || {
        (replica.get("/readyz").await.status == 503).then_some(())
    })
    .await;
    replica.signal("INT");
    assert!(replica.ends_within(Duration::from_secs(3)).await.is_some());
}
