//! Real input: processes of the example client do real work while they are killed and stopped, and
//! while a replica is restarted every few seconds.

use std::fmt::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rand::RngExt;
use rand::rngs::StdRng;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Campaign;
use crate::support::{Replica, TestDb};

const LEASE: Duration = Duration::from_secs(2);
/// A pause between two faults, in ms.
const BETWEEN_FAULTS_MS: std::ops::Range<u64> = 300..1_200;
/// How long a worker is stopped, in ms: past its lease.
const STOPPED_MS: std::ops::Range<u64> = 2_500..6_000;
/// Beyond this the run has hung.
const TASK_SECONDS_MAX: u64 = 2;

/// What a worker does with a task: packs a file, and says what it was and what became of it. The
/// pause stands for the rest of a build, so that there is something to interrupt.
const WORK: &str = r#"python3 -c '
import hashlib, json, sys, time, zlib
task = json.load(sys.stdin)
data = open(task["prompt"], "rb").read()
packed = len(zlib.compress(data, 9))
time.sleep(task["metadata"]["seconds"])
print(json.dumps({"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "packed": packed}))'"#;

/// One worker process.
struct Worker {
    process: Child,
    /// Set while it is stopped.
    goes_on_at: Option<Instant>,
}

impl Worker {
    fn start(server: &str) -> Self {
        let mut command = Command::new("python3");
        command
            .args(["examples/worker_sse_client.py", "--server", server, "--exec", WORK])
            .args(["--codebases", "files"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self { process: command.spawn().expect("python3 is there"), goes_on_at: None }
    }

    fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(sent.expect("kill runs").success());
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Faults so far.
#[derive(Default)]
struct Counts {
    killed: usize,
    stopped: usize,
    restarted: usize,
}

struct Fleet {
    workers: Vec<Worker>,
    replicas: Vec<Option<Replica>>,
    urls: Vec<String>,
    counts: Counts,
    rng: StdRng,
}

impl Fleet {
    fn url(&mut self) -> String {
        let n = self.rng.random_range(0..self.urls.len());
        self.urls[n].clone()
    }

    /// One fault: a worker is killed and another one started, a worker is stopped past its lease, or a
    /// replica is killed or asked to go, and comes back at its address.
    async fn fault(&mut self, db: &TestDb) {
        let n = self.rng.random_range(0..self.workers.len());
        match self.rng.random_range(0..5) {
            0 | 1 => {
                let url = self.url();
                self.workers[n] = Worker::start(&url);
                self.counts.killed += 1;
            }
            2 | 3 if self.workers[n].goes_on_at.is_none() => {
                self.workers[n].signal("STOP");
                let ms = self.rng.random_range(STOPPED_MS);
                self.workers[n].goes_on_at = Some(Instant::now() + Duration::from_millis(ms));
                self.counts.stopped += 1;
            }
            _ => {
                let n = self.rng.random_range(0..self.replicas.len());
                if let Some(mut replica) = self.replicas[n].take() {
                    if self.rng.random() {
                        replica.signal("TERM");
                        replica.ends_within(Duration::from_secs(10)).await;
                    }
                    drop(replica);
                }
                self.replicas[n] = Some(start(db, &self.urls[n]).await);
                self.counts.restarted += 1;
            }
        }
    }

    fn wake_who_slept_enough(&mut self) {
        for worker in &mut self.workers {
            if worker.goes_on_at.is_some_and(|at| at <= Instant::now()) {
                worker.signal("CONT");
                worker.goes_on_at = None;
            }
        }
    }
}

async fn start(db: &TestDb, url: &str) -> Replica {
    let address = url.trim_start_matches("http://");
    let lease = LEASE.as_secs().to_string();
    Replica::start_with(db, &["--bind", address, "--lease-seconds", &lease]).await
}

/// Files of this project, as the work there is.
fn files() -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec!["src".into(), "tests".into(), "migrations".into()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir::<std::path::PathBuf>(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(path.canonicalize().unwrap());
            }
        }
    }
    files.sort();
    files
}

#[tokio::test]
async fn real_workers_that_are_killed_and_stopped_end_every_task_exactly_once() {
    let campaign =
        Campaign::new("real_workers_that_are_killed_and_stopped_end_every_task_exactly_once");
    let (tasks, workers) = (campaign.number("REAL_TASKS", 40), campaign.number("REAL_WORKERS", 4));
    let db = TestDb::new().await;
    let replicas = [start(&db, "127.0.0.1:0").await, start(&db, "127.0.0.1:0").await];
    let urls: Vec<_> = replicas.iter().map(|replica| replica.url.clone()).collect();
    let files = files();
    let mut batch = Vec::new();
    for n in 0..tasks {
        let path = files[n % files.len()].display().to_string();
        // More attempts than faults could cost: what is shown here is that none is lost.
        batch.push(json!({
            "title": format!("pack {path}"), "prompt": path, "codebase_id": "files",
            "metadata": {"seconds": 0.1}, "max_attempts": 1000,
        }));
    }
    for part in batch.chunks(1_000) {
        replicas[0].post("/v1/tasks/batch", json!(part)).await.expect(201);
    }
    let mut fleet = Fleet {
        workers: (0..workers).map(|n| Worker::start(&urls[n % 2])).collect(),
        replicas: replicas.into_iter().map(Some).collect(),
        urls,
        counts: Counts::default(),
        rng: campaign.rng("faults", 0),
    };
    let most = Duration::from_secs(60 + tasks as u64 * TASK_SECONDS_MAX);
    while db.value("select count(*) from tasks where finished_at is null").await != "0" {
        assert!(campaign.begun.elapsed() < most, "it does not end");
        fleet.fault(&db).await;
        let ms = fleet.rng.random_range(BETWEEN_FAULTS_MS);
        tokio::time::sleep(Duration::from_millis(ms)).await;
        fleet.wake_who_slept_enough();
    }
    // Who is still stopped comes too late with what it has, and is to be refused.
    for worker in &mut fleet.workers {
        if worker.goes_on_at.take().is_some() {
            worker.signal("CONT");
        }
    }
    tokio::time::sleep(LEASE).await;

    let all = tasks.to_string();
    assert_eq!(db.value("select count(*) from tasks where status = 'completed'").await, all);
    let completions = "select count(*) from attempts where outcome = 'completed'";
    assert_eq!(db.value(completions).await, all, "each exactly once");
    let twice = "select count(*) from (select task_id from attempts where outcome = 'completed'
                  group by task_id having count(*) > 1) t";
    assert_eq!(db.value(twice).await, "0");
    for path in files.iter().take(tasks) {
        let mut hex = String::new();
        for byte in Sha256::digest(std::fs::read(path).unwrap()) {
            write!(hex, "{byte:02x}").unwrap();
        }
        let wrong = format!(
            "select count(*) from tasks where prompt = '{}' and result->>'sha256' <> '{hex}'",
            path.display()
        );
        assert_eq!(db.value(&wrong).await, "0");
    }
    let by_attempts = "select string_agg(attempts || ' attempts: ' || tasks, ', ' order by attempts)
        from (select attempts, count(*) as tasks
                from (select task_id, count(*) as attempts from attempts where outcome <> 'released' group by task_id) t
               group by attempts) t";
    let by_outcome = "select string_agg(outcome || ' ' || n, ', ' order by outcome)
        from (select outcome, count(*) as n from attempts group by outcome) t";
    let late = db.value("select coalesce(sum(late_calls), 0) from attempts").await;
    let Counts { killed, stopped, restarted } = fleet.counts;
    campaign.figures(&format!(
        "{tasks} tasks, {workers} workers; {killed} killed, {stopped} stopped, {restarted} replica restarts; \
         tasks by attempts: {}; claims by outcome: {}; {late} stale calls refused",
        db.value(by_attempts).await,
        db.value(by_outcome).await,
    ));
}
