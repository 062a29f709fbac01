//! Real nginx and HAProxy before real replicas: as we ship their configurations, and as they come
//! (P12, P13; F45 to F48).

mod configs;
mod crew;
mod cuts;
mod cutter;
mod defaults;
mod process;
mod python;
mod rolling;
mod shipped;
mod stream;
mod upheaval;

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Answer, PATIENCE, Replica, TestDb, eventually, http_client};
use configs::Setup;
use process::{Kind, Process, free_port};
use stream::RawStream;

/// A replica that is about to end does not hold up who looks at all of them.
const METRICS_WAIT: Duration = Duration::from_millis(500);

/// Replicas behind a proxy.
struct Proxied {
    proxy: Process,
    replicas: Vec<Option<Replica>>,
    addresses: Vec<SocketAddr>,
    flags: Vec<String>,
    http: reqwest::Client,
    db: TestDb,
}

impl Proxied {
    /// Two replicas behind a proxy; `None`: the program is missing, and the test is skipped.
    async fn start(kind: Kind, setup: Setup, flags: &[&str]) -> Option<Self> {
        Self::start_many(kind, setup, 2, flags).await
    }

    async fn start_many(kind: Kind, setup: Setup, count: usize, flags: &[&str]) -> Option<Self> {
        kind.find()?;
        let db = TestDb::new().await;
        let flags: Vec<_> = flags.iter().map(|&flag| flag.to_owned()).collect();
        let (mut replicas, mut addresses) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
            replicas.push(Some(boot(&db, address, &flags).await));
            addresses.push(address);
        }
        let write = |port, folder: &_| configs::write(kind, setup, &addresses, port, folder);
        let proxy = Process::start(kind, write).await?;
        let http = http_client().timeout(PATIENCE).build().unwrap();
        Some(Self { proxy, replicas, addresses, flags, http, db })
    }

    /// Where the proxy listens.
    fn address(&self) -> SocketAddr {
        self.proxy.url.strip_prefix("http://").expect("plain").parse().expect("an address")
    }

    /// Puts a new replica where one was.
    async fn boot(&mut self, n: usize) {
        self.replicas[n] = Some(boot(&self.db, self.addresses[n], &self.flags).await);
    }

    /// Opens a stream through the proxy.
    async fn stream(&self, query: &str, headers: &str) -> RawStream {
        let stream = RawStream::open(self.address(), query, headers).await.expect("an answer");
        assert_eq!(stream.status, 200, "{}", stream.head);
        stream
    }

    /// Repeated while Postgres is not available: on a busy machine it answers late.
    async fn post(&self, path: &str, body: Value) -> Answer {
        eventually("it is no 503", async || {
            let request = self.http.post(format!("{}{path}", self.proxy.url)).json(&body);
            let response = request.send().await.expect("the proxy answers");
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            let text = response.text().await.expect("a body");
            (status != 503).then_some(Answer { status, headers, text })
        })
        .await
    }

    async fn get(&self, path: &str) -> Answer {
        let request = self.http.get(format!("{}{path}", self.proxy.url));
        let response = request.send().await.expect("the proxy answers");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, text: response.text().await.expect("a body") }
    }

    /// Creates a task and gives its id.
    async fn create(&self, body: Value) -> String {
        let task = self.post("/v1/tasks", body).await.expect(201);
        task["id"].as_str().expect("an id").to_owned()
    }

    /// Claims and completes a task, as `?worker_id=`.
    async fn claim_and_complete(&self, task: &str, worker: &str) {
        let path = |verb| format!("/v1/tasks/{task}/{verb}?worker_id={worker}");
        let claim_id = uuid::Uuid::new_v4().to_string();
        let claim = self.post(&path("claim"), json!({"claim_id": claim_id})).await.expect(200);
        let body = json!({"claim_epoch": claim["claim_epoch"], "result": "done"});
        let done = self.post(&path("complete"), body).await.expect(200);
        assert_eq!(done["status"], "completed");
    }
}

/// How many streams are open on a replica; `None`: it does not answer.
async fn streams_on(http: &reqwest::Client, replica: SocketAddr) -> Option<usize> {
    let request = http.get(format!("http://{replica}/metrics")).timeout(METRICS_WAIT);
    let text = request.send().await.ok()?.text().await.ok()?;
    let line = text.lines().find(|line| line.contains("streams_open") && !line.starts_with('#'))?;
    line.rsplit(' ').next()?.parse().ok()
}

async fn boot(db: &TestDb, address: SocketAddr, flags: &[String]) -> Replica {
    let address = address.to_string();
    let mut all = vec!["--bind", &address];
    all.extend(flags.iter().map(String::as_str));
    Replica::start_with(db, &all).await
}
