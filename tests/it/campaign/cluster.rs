//! A Postgres of the campaign's own, to be stopped, killed and frozen. The same guard keeps it that
//! keeps the embedded one: whatever dies is started again, and all ends with this process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sqlx::ConnectOptions;
use sqlx::postgres::PgConnectOptions;
use taskwire::embedded::{Embedded, Options};

use crate::support::{TestDb, eventually};

/// Few enough that they can be used up (F9): three replicas take 63 at most.
const CONNECTIONS_MAX: usize = 100;
/// The role of the servers: no superuser, so that it can be locked out, and the last slots are not
/// for it.
const SERVER: &str = "server";

/// The cluster.
pub struct Cluster {
    home: PathBuf,
    embedded: Option<Embedded>,
    url: String,
    /// The URL of the servers' role.
    pub server_url: String,
}

/// How Postgres goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `pg_ctl stop -m fast`.
    Fast,
    /// `pg_ctl stop -m immediate`.
    Immediate,
    /// SIGKILL of the postmaster, then of the backends that it leaves behind.
    Kill,
}

impl Cluster {
    /// Makes a cluster and starts it, with a database.
    pub async fn new() -> (Self, TestDb) {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        remove_leftovers(folder);
        let home = folder.join(format!("campaign-{}", std::process::id()));
        let embedded = Embedded::start(&Options {
            data_dir: home.clone(),
            postgres_bin: std::env::var_os("TASKWIRE_POSTGRES_BIN").map(Into::into),
            guard_exe: env!("CARGO_BIN_EXE_taskwire").into(),
        })
        .await
        .expect("the campaign's Postgres starts");
        let db = TestDb::on(embedded.url()).await;
        db.execute(&format!("alter system set max_connections = {CONNECTIONS_MAX}")).await;
        db.execute("alter system set log_checkpoints = off").await;
        db.execute(&format!("create role {SERVER} login")).await;
        // A debug build takes long over a password, and replicas connect often here.
        let rules = home.join("postgres/pg_hba.conf");
        let before = std::fs::read_to_string(&rules).expect("the rules of who may connect");
        std::fs::write(&rules, format!("host all {SERVER} 127.0.0.1/32 trust\n{before}")).unwrap();
        db.execute(&format!("alter database {} owner to {SERVER}", db.name)).await;
        let options: PgConnectOptions = db.url.parse().unwrap();
        let options = options.username(SERVER).password("none");
        let server_url = options.to_url_lossy().to_string();
        let url = db.url.clone();
        let cluster = Self { home, embedded: Some(embedded), url, server_url };
        cluster.stop(Stop::Fast, Duration::ZERO);
        eventually("Postgres is there again, with fewer connections", async || {
            let found = db.try_value("current_setting('max_connections')").await?;
            (found == CONNECTIONS_MAX.to_string()).then_some(())
        })
        .await;
        (cluster, db)
    }

    /// Stops it for a while. The guard sleeps as long, and is woken by a process of its own, also when
    /// this one is killed meanwhile. Returns at once; `false`: there was none to stop.
    pub fn stop(&self, how: Stop, away: Duration) -> bool {
        let (Some(postmaster), Some(guard)) = (self.postmaster(), self.guard()) else {
            return false;
        };
        let victims = match how {
            Stop::Fast => format!("kill -INT {postmaster}"),
            Stop::Immediate => format!("kill -QUIT {postmaster}"),
            Stop::Kill => {
                format!("kill -KILL {postmaster}; sleep 0.2; kill -KILL {}", children(postmaster))
            }
        };
        self.while_guard_sleeps(guard, &victims, away, "true");
        true
    }

    /// SIGSTOP of the postmaster and of every backend: connections stay, and nothing answers.
    pub fn freeze(&self, pause: Duration) -> bool {
        let (Some(postmaster), Some(guard)) = (self.postmaster(), self.guard()) else {
            return false;
        };
        let all = format!("{postmaster} {}", children(postmaster));
        self.while_guard_sleeps(
            guard,
            &format!("kill -STOP {all}"),
            pause,
            &format!("kill -CONT {all}"),
        );
        true
    }

    #[expect(clippy::unused_self, reason = "it is done to this cluster")]
    fn while_guard_sleeps(&self, guard: u32, first: &str, pause: Duration, last: &str) {
        let seconds = pause.as_secs_f64();
        let script =
            format!("kill -STOP {guard}; {first}; sleep {seconds:.3}; {last}; kill -CONT {guard}");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]).stderr(std::process::Stdio::null());
        let mut shell = command.spawn().expect("sh runs");
        std::thread::spawn(move || shell.wait());
    }

    /// Whether Postgres accepts and answers, asked by a connection of its own.
    pub async fn accepts(&self) -> bool {
        let options: PgConnectOptions = self.url.parse().unwrap();
        let options = options.disable_statement_logging();
        let answers = async { sqlx::Connection::ping(&mut options.connect().await?).await };
        matches!(tokio::time::timeout(Duration::from_secs(1), answers).await, Ok(Ok(())))
    }

    fn postmaster(&self) -> Option<u32> {
        number_in(&self.home.join("postgres/postmaster.pid"))
            .filter(|pid| is_named(*pid, "postgres"))
    }

    fn guard(&self) -> Option<u32> {
        number_in(&self.home.join("guard.lock")).filter(|pid| is_named(*pid, "taskwire"))
    }

    /// The end of Postgres' log, for whoever asks why.
    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(self.home.join("postgres.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(40).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the end of Postgres' log ---\n{}", self.log());
        }
        drop(self.embedded.take());
        // The guard notices within a moment that nobody is left; nothing of this is wanted any more.
        let begun = std::time::Instant::now();
        while self.postmaster().is_some() && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(50));
        }
        remove(&self.home);
    }
}

fn number_in(file: &Path) -> Option<u32> {
    std::fs::read_to_string(file).ok()?.lines().next()?.trim().parse().ok()
}

fn is_named(pid: u32, name: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
}

/// The pids of a process's children, as words.
fn children(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default()
}

/// Clusters of runs that were killed.
fn remove_leftovers(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(pid) = name.strip_prefix("campaign-")
            && !Path::new("/proc").join(pid).exists()
        {
            remove(&entry.path());
        }
    }
}

/// With what the own Postgres keeps elsewhere for it.
fn remove(home: &Path) {
    if let Ok(elsewhere) = std::fs::read_link(home.join("postgres"))
        && let Some(folder) = elsewhere.parent()
    {
        let _ = std::fs::remove_dir_all(folder);
    }
    let _ = std::fs::remove_dir_all(home);
}
