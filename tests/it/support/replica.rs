//! One real server process.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};

use super::database::TestDb;
use super::sse::SseStream;
use super::{PATIENCE, http_client};

/// How long the last lines of a server that has ended may take to arrive.
const LAST_WORDS_WAIT: Duration = Duration::from_secs(2);

/// A replica of its own, killed when dropped.
pub struct Replica {
    pub url: String,
    child: Child,
    log: Arc<Mutex<String>>,
    client: reqwest::Client,
}

/// A response: status, headers and body.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    /// The `code` of a problem, after checking that it is a well-made one.
    pub fn problem(&self) -> String {
        let kind = self.headers.get("content-type").and_then(|v| v.to_str().ok());
        assert_eq!(kind, Some("application/problem+json"), "{self:?}");
        let body = self.json();
        assert_eq!(body["status"], self.status, "{self:?}");
        for member in ["type", "title", "detail", "code"] {
            assert!(
                body[member].as_str().is_some_and(|text| !text.is_empty()),
                "{member}: {self:?}"
            );
        }
        body["code"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub fn expect(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        self.json()
    }
}

impl Replica {
    pub async fn start(db: &TestDb) -> Self {
        Self::start_with(db, &[]).await
    }

    /// Starts with further settings, as flags.
    pub async fn start_with(db: &TestDb, flags: &[&str]) -> Self {
        Self::spawn(Self::command(db, flags)).await
    }

    /// The command of a replica on this database, with further settings as flags.
    pub fn command(db: &TestDb, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_taskwire"));
        command
            .args(["serve", "--bind", "127.0.0.1:0", "--database-url", &db.url])
            .args(["--drain-seconds", "1"])
            .args(flags);
        command
    }

    /// Starts a server by any command that prints where it serves.
    pub async fn spawn(command: Command) -> Self {
        match Self::try_spawn(command, PATIENCE).await {
            Ok(replica) => replica,
            Err(why) => panic!("{why}"),
        }
    }

    /// The same where the start may fail, as with Postgres away: why it did then.
    pub async fn try_spawn(mut command: Command, patience: Duration) -> Result<Self, String> {
        let client = http_client().timeout(PATIENCE).build().unwrap();
        let mut child = command
            .env("RUST_LOG", "info,taskwire=debug,worker_sse=debug")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the server starts");
        let (out, log) = (Arc::default(), Arc::default());
        collect(child.stdout.take().expect("piped"), Arc::clone(&out));
        let reading = collect(child.stderr.take().expect("piped"), Arc::clone(&log));
        // From here on a panic ends the process too.
        let mut replica = Self { url: String::new(), child, log, client };
        let begun = std::time::Instant::now();
        loop {
            let found = out.lock().unwrap().lines().find_map(|line| {
                line.split_once("serves on ").map(|(_, url)| url.trim().to_owned())
            });
            if let Some(url) = found {
                replica.url = url;
                return Ok(replica);
            }
            if let Some(status) = replica.has_ended() {
                // What it said last is the reason.
                let ended = std::time::Instant::now();
                while !reading.is_finished() && ended.elapsed() < LAST_WORDS_WAIT {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                return Err(format!("the server ended ({status}): {}", replica.log()));
            }
            if begun.elapsed() > patience {
                let log = replica.log();
                return Err(format!("the server does not serve within {patience:?}: {log}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How it ended, if it did.
    pub fn has_ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().expect("the child can be asked")
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends the process a signal by name.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.pid().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// SIGKILL: no farewell.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether the process ended within a time, and how.
    pub async fn ends_within(&mut self, limit: Duration) -> Option<std::process::ExitStatus> {
        let begun = std::time::Instant::now();
        while begun.elapsed() < limit {
            if let Some(status) = self.has_ended() {
                return Some(status);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        None
    }

    pub async fn request(&self, request: reqwest::RequestBuilder) -> Answer {
        let response = request.send().await.expect("the server answers");
        Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            text: response.text().await.expect("the answer has a body"),
        }
    }

    pub fn http(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        self.client.request(method, format!("{}{path}", self.url))
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.request(self.http("GET", path)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.request(self.http("POST", path).json(&body)).await
    }

    /// Creates a task and gives its id.
    pub async fn create(&self, body: Value) -> String {
        let task = self.post("/v1/tasks", body).await.expect(201);
        task["id"].as_str().unwrap().to_owned()
    }

    pub async fn register(&self, worker: &str, codebases: &[&str], capabilities: &[&str]) {
        let body = json!({
            "name": worker, "worker_id": worker, "codebases": codebases, "capabilities": capabilities,
        });
        self.post("/v1/agent/workers/register", body).await.expect(200);
    }

    pub async fn claim(&self, task: &str, worker: &str) -> Answer {
        self.post(&format!("/v1/tasks/{task}/claim"), json!({ "worker_id": worker })).await
    }

    /// Ends a claim: `verb` is complete, fail or release.
    pub async fn finish(&self, verb: &str, task: &str, worker: &str, more: Value) -> Answer {
        let mut body = more;
        body["worker_id"] = json!(worker);
        self.post(&format!("/v1/tasks/{task}/{verb}"), body).await
    }

    pub async fn task(&self, id: &str) -> Value {
        self.get(&format!("/v1/tasks/{id}")).await.expect(200)
    }

    /// Opens a stream and reads its `connected`.
    pub async fn stream(&self, query: &str) -> SseStream {
        let mut stream = SseStream::open(&self.url, query, &[]).await;
        let first = stream.next().await;
        assert_eq!(first.name, "connected", "{first:?}");
        stream
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of {} ---\n{}", self.url, self.log());
        }
    }
}

fn collect(from: impl Read + Send + 'static, into: Arc<Mutex<String>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let mut text = into.lock().unwrap();
            text.push_str(&line);
            text.push('\n');
        }
    })
}
