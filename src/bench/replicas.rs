//! Replicas as processes of their own: this very program, ended by their process ids.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{sleep, timeout};

use super::Failure;
use super::client::{Connection, get, post};
use super::ground::{Database, Ground};

/// How long a replica may take until it serves.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long it may take to end before it is killed.
const END_DEADLINE: Duration = Duration::from_secs(5);
/// How often to ask whether it is ready.
const POLL: Duration = Duration::from_millis(20);
/// Bytes of its log that are shown when it does not start.
const LAST_WORDS_BYTES: usize = 2_000;

/// A server process; gone when dropped.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) pid: u32,
    child: Child,
    /// The child ends when this closes: also when this process is killed.
    _alive: Option<ChildStdin>,
}

/// Why a replica did not start.
#[derive(Debug)]
pub(super) enum NotStarted {
    /// It does not know this setting: another build might.
    Refused,
    Failed(Failure),
}

impl From<Failure> for NotStarted {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<std::io::Error> for NotStarted {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl From<NotStarted> for Failure {
    fn from(not: NotStarted) -> Self {
        match not {
            NotStarted::Refused => "this build refuses a setting of the measurement".into(),
            NotStarted::Failed(failure) => failure,
        }
    }
}

/// Starts a replica on a database, with settings by their names in the environment.
pub(super) async fn replica(
    ground: &Ground,
    database: &Database,
    settings: &[(&str, &str)],
) -> Result<Server, NotStarted> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["bench-replica", "--bind", "127.0.0.1:0", "--drain-seconds", "0"])
        .env("DATABASE_URL", database.url())
        .env("DATABASE_LISTEN_URL", database.url())
        .env("RUST_LOG", "warn")
        .env("TASKWIRE_LOG_FORMAT", "text")
        .envs(settings.iter().copied());
    let server = Server::spawn(ground, command).await?;
    let begun = Instant::now();
    while begun.elapsed() < START_DEADLINE {
        let mut connection = Connection::open(server.address).await?;
        if connection.call(&get("/readyz")).await?.status == 200 {
            return Ok(server);
        }
        sleep(POLL).await;
    }
    Err(NotStarted::Failed("a replica is not ready".into()))
}

/// Several of them.
pub(super) async fn replicas(
    ground: &Ground,
    database: &Database,
    count: usize,
    settings: &[(&str, &str)],
) -> Result<Vec<Server>, NotStarted> {
    let mut servers = Vec::with_capacity(count);
    for _ in 0..count {
        servers.push(replica(ground, database, settings).await?);
    }
    Ok(servers)
}

/// Starts the minimal server that floors of HTTP are measured with.
pub(super) async fn minimal(ground: &Ground) -> Result<Server, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("bench-minimal");
    Ok(Server::spawn(ground, command).await?)
}

impl Server {
    /// Starts a server that prints where it serves and ends with its standard input.
    async fn spawn(ground: &Ground, mut command: Command) -> Result<Self, NotStarted> {
        let log = ground.folder().join("server.log");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .kill_on_drop(true)
            .spawn()?;
        let alive = child.stdin.take();
        let (Some(out), Some(pid)) = (child.stdout.take(), child.id()) else {
            return Err(NotStarted::Failed("a server ended at once".into()));
        };
        let mut lines = BufReader::new(out).lines();
        let find = async {
            while let Some(line) = lines.next_line().await? {
                if let Some((_, address)) = line.split_once("serves on http://") {
                    return Ok(address.trim().parse().ok());
                }
            }
            Ok::<Option<SocketAddr>, std::io::Error>(None)
        };
        let Some(address) = timeout(START_DEADLINE, find).await.unwrap_or(Ok(None))? else {
            let said = fs::read_to_string(&log).unwrap_or_default();
            if said.contains("must be") {
                return Err(NotStarted::Refused);
            }
            let from = said.len().saturating_sub(LAST_WORDS_BYTES);
            let end = said.get(from..).unwrap_or(&said);
            return Err(NotStarted::Failed(format!("a server does not start: {end}").into()));
        };
        // So that it can go on printing.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self { address, pid, child, _alive: alive })
    }

    /// Lets it say goodbye.
    pub(super) async fn end(mut self) {
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = timeout(END_DEADLINE, self.child.wait()).await;
    }

    /// Registers a worker for these codebases.
    pub(super) async fn register(&self, worker: &str, codebases: &[&str]) -> Result<(), Failure> {
        let body = serde_json::json!({
            "worker_id": worker, "name": worker, "codebases": codebases, "capabilities": [],
        });
        let mut connection = Connection::open(self.address).await?;
        let request = post("/v1/agent/workers/register", &body.to_string());
        Ok(connection.call(&request).await?.expect(200)?)
    }
}

/// Ends several, at once.
pub(super) async fn end_all(servers: Vec<Server>) {
    futures_util::future::join_all(servers.into_iter().map(Server::end)).await;
}
