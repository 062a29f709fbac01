//! The Python client of the user's document, as it stands there, through both proxies.

use std::process::{Command, Stdio};

use serde_json::json;

use super::Proxied;
use super::configs::Setup;
use super::process::Kind;
use crate::support::{eventually, programs};

/// The document leaves `claim_and_execute_task` open. What it shows looks at an `event:` and at its
/// `data:` apart, so the id that it hands over is always None: this claims the best there is, and
/// takes the id where there is one.
const FILLED_IN: &str = r#"
import sys, uuid, json

SERVER = sys.argv[1]

def claim_and_execute_task(task_id):
    path = f"/v1/tasks/{task_id}/claim" if task_id else "/v1/tasks/claim"
    claim = {"worker_id": "worker-123", "claim_id": str(uuid.uuid4())}
    answer = requests.post(SERVER + path, json=claim)
    if answer.status_code != 200:
        return
    for task in answer.json().get("tasks", [answer.json()]):
        done = {"worker_id": "worker-123", "claim_epoch": task["claim_epoch"],
                "result": {"title": task["title"]}}
        requests.post(f"{SERVER}/v1/tasks/{task['id']}/complete", json=done).raise_for_status()
"#;

const DOCUMENT: &str = r#"
import requests

def connect_sse_worker(worker_id: str, server_url: str = "http://localhost:8000"):
    """Connect to SSE endpoint and listen for task notifications."""
    url = f"{server_url}/v1/worker/tasks/stream"
    headers = {
        "X-Codebases": "my-project,api",
        "X-Capabilities": "agent,build,deploy,test"
    }

    with requests.get(url, headers=headers, params={"worker_id": worker_id}, stream=True) as response:
        for line in response.iter_lines():
            if line:
                event = parse_sse_event(line)
                handle_event(event)

def parse_sse_event(line: bytes) -> dict:
    """Parse SSE event line."""
    if line.startswith(b"event: "):
        event_type = line[7:].decode().strip()
        return {"event": event_type}
    if line.startswith(b"data: "):
        return json.loads(line[6:])
    return {}

def handle_event(event: dict):
    """Handle incoming SSE event."""
    event_type = event.get("event")
    data = event.get("data", {})

    if event_type == "task_available":
        task_id = data.get("task_id")
        print(f"New task available: {task_id}")
        claim_and_execute_task(task_id)
"#;

async fn serves_the_documents_client(kind: Kind, setup: Setup) {
    if programs::find("python3").is_none() {
        return;
    }
    let has_requests = Command::new("python3").args(["-c", "import requests"]).output();
    if !has_requests.expect("python3 runs").status.success() {
        eprintln!("skipped: Python's `requests` is not installed");
        return;
    }
    let Some(behind) = Proxied::start(kind, setup, &[]).await else { return };
    let code = format!("{FILLED_IN}{DOCUMENT}\nconnect_sse_worker('worker-123', SERVER)");
    let mut client = tokio::process::Command::new("python3")
        .args(["-c", &code, &behind.proxy.url])
        .env("no_proxy", "*")
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("python3 runs");
    for codebase in ["my-project", "global", "__pending__", "api"] {
        let task = behind.create(json!({"title": codebase, "codebase_id": codebase})).await;
        eventually("the client did it", async || {
            let found = behind.get(&format!("/v1/tasks/{task}")).await.expect(200);
            (found["status"] == "completed" && found["result"]["title"] == codebase).then_some(())
        })
        .await;
    }
    client.kill().await.expect("it is there");
}

#[tokio::test]
async fn the_client_of_the_users_document_works_behind_proxies_as_shipped_and_as_they_come() {
    tokio::join!(
        serves_the_documents_client(Kind::Nginx, Setup::Shipped),
        serves_the_documents_client(Kind::Nginx, Setup::Compressing),
        serves_the_documents_client(Kind::Haproxy, Setup::Shipped),
        serves_the_documents_client(Kind::Haproxy, Setup::Compressing),
    );
}
