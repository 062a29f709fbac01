//! The example workers against a real server, and the client of the user's document as it stands.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{PATIENCE, Replica, TestDb, eventually};

/// A worker process, killed at the end.
struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn python(arguments: &[&str]) -> Worker {
    let mut command = Command::new("python3");
    command.arg("examples/worker_sse_client.py").args(arguments);
    Worker(command.stdout(Stdio::null()).spawn().expect("python3 is there"))
}

async fn tasks_of_files(replica: &Replica) -> Vec<(String, String)> {
    let mut tasks = Vec::new();
    for entry in std::fs::read_dir("src/domain").unwrap() {
        let path = entry.unwrap().path().canonicalize().unwrap().display().to_string();
        let body = json!({"title": path, "prompt": path, "codebase_id": "files"});
        tasks.push((replica.create(body).await, path));
    }
    tasks
}

async fn completed(replica: &Replica, id: &str) -> Value {
    eventually("the task is completed", async || {
        let task = replica.task(id).await;
        (task["status"] == "completed").then_some(task)
    })
    .await
}

#[tokio::test]
async fn python_workers_on_two_replicas_do_each_task_once_and_go_when_asked() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let worker = |n: usize| {
        let (id, server) = (format!("python-{n}"), &replicas[n % 2].url);
        let handler = ["--handler", "file-stats", "--codebases", "files"];
        python(&[&["--server", server, "--worker-id", &id], &handler[..]].concat())
    };
    let mut workers: Vec<_> = (0..3).map(worker).collect();
    let tasks = tasks_of_files(&replicas[0]).await;
    for (id, path) in &tasks {
        let task = completed(&replicas[1], id).await;
        let text = std::fs::read(path).unwrap();
        assert_eq!(task["result"]["path"], path.as_str());
        assert_eq!(task["result"]["bytes"], text.len());
        let lines = String::from_utf8(text).unwrap().lines().count();
        assert_eq!((&task["result"]["lines"], &task["attempt"]), (&json!(lines), &json!(1)));
    }
    for worker in &mut workers {
        let pid = worker.0.id().to_string();
        assert!(Command::new("kill").args(["-s", "TERM", &pid]).status().unwrap().success());
    }
    for worker in &mut workers {
        let ended = tokio::time::timeout(PATIENCE, async {
            loop {
                match worker.0.try_wait().unwrap() {
                    Some(status) => break status,
                    None => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        });
        assert!(ended.await.unwrap().success());
    }
    eventually("they said farewell", async || {
        let connected = replicas[0].get("/v1/workers/connected").await.expect(200);
        connected.as_array().unwrap().is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_python_worker_finds_the_replica_that_took_over() {
    let db = TestDb::new().await;
    let first = Replica::start(&db).await;
    let address = first.url.strip_prefix("http://").unwrap().to_owned();
    let _worker = python(&["--server", &first.url, "--worker-id", "p"]);
    let id = first.create(json!({"title": "before"})).await;
    completed(&first, &id).await;
    first.kill();
    // The same address, as behind a load balancer.
    let second = Replica::start_with(&db, &["--bind", &address]).await;
    let id = second.create(json!({"title": "after"})).await;
    completed(&second, &id).await;
}

#[tokio::test]
async fn a_worker_of_nothing_but_curl_and_sh_does_its_work() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let script = std::fs::read_to_string("examples/worker.sh").unwrap();
    assert!(script.lines().count() < 30, "under 30 lines");
    // In a session of its own, so that curl goes with it.
    let worker = Command::new("setsid")
        .args(["sh", "examples/worker.sh"])
        .env("TASKWIRE_SERVER", &replica.url)
        .env("WORKER_ID", "shell")
        .env("CODEBASES", "files")
        .stdout(Stdio::null())
        .spawn()
        .expect("sh is there");
    let worker = Worker(worker);
    for (id, _) in tasks_of_files(&replica).await {
        let task = completed(&replica, &id).await;
        assert_eq!(task["claimed_by"], "shell");
    }
    let group = format!("-{}", worker.0.id());
    let _ = Command::new("kill").args(["-s", "KILL", "--", &group]).status();
}

/// The code of the user's document, as it stands there, with what it leaves open filled in.
const CLIENT_OF_THE_DOCUMENT: &str = r#"
import json, sys, urllib.request

def iter_lines(response):
    for line in response:
        yield line.rstrip(b"\r\n")

def connect_sse_worker(worker_id, server_url):
    url = f"{server_url}/v1/worker/tasks/stream?worker_id={worker_id}"
    headers = {"X-Codebases": "my-project,api", "X-Capabilities": "agent,build,deploy,test"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
        event = {}
        for line in iter_lines(response):
            if line:
                event.update(parse_sse_event(line))
            else:
                handle_event(event)
                event = {}

def parse_sse_event(line: bytes) -> dict:
    """Parse SSE event line."""
    if line.startswith(b"event: "):
        event_type = line[7:].decode().strip()
        return {"event": event_type}
    if line.startswith(b"data: "):
        return {"data": json.loads(line[6:])}
    return {}

def handle_event(event: dict):
    event_type = event.get("event")
    data = event.get("data", {})
    if event_type == "task_available":
        task_id = data.get("task_id")
        print(f"New task available: {task_id}", flush=True)

connect_sse_worker("worker-123", sys.argv[1])
"#;

#[tokio::test]
async fn the_client_of_the_users_document_hears_of_new_tasks() {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut client = tokio::process::Command::new("python3")
        .args(["-c", CLIENT_OF_THE_DOCUMENT, &replica.url])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
    for codebase in ["my-project", "global", "__pending__", "api"] {
        let id = replica.create(json!({"title": "x", "codebase_id": codebase})).await;
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await;
        assert_eq!(line.unwrap().unwrap().unwrap(), format!("New task available: {id}"));
    }
}
