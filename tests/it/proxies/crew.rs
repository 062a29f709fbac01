//! Workers that do what the README asks of a worker: they reconnect, claim with a `claim_id`,
//! complete with the epoch, and repeat a call until it is answered. And what they saw.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::stream::RawStream;
use crate::support::{Answer, TestDb, eventually, http_client};

const CALL_WAIT: Duration = Duration::from_secs(5);
/// Backoff of a worker whose stream was refused: 1, 2, 4, … s, as the README says.
const BACKOFF_MAX: Duration = Duration::from_mins(1);
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Pause before a call without an answer is sent again.
const CALL_PAUSE: Duration = Duration::from_millis(100);
/// Workers are started this far apart, as people would: not all in one moment.
const START_GAP: Duration = Duration::from_millis(1);

/// How soon a worker comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Return {
    /// After `retry:`, or later.
    AsTold,
    /// At once, as an impatient client would.
    AtOnce,
}

/// What all workers of a test share.
pub struct Crew {
    /// Where streams and calls go.
    server: SocketAddr,
    http: reqwest::Client,
    comes_back: Return,
    is_closing: AtomicBool,
    pub tally: Tally,
    /// Who was given which claim.
    claims: Mutex<HashMap<(String, i64), String>>,
    /// Why calls had to be repeated, and how often.
    unanswered: Mutex<BTreeMap<String, usize>>,
    /// Acknowledged creations.
    created: Mutex<Vec<String>>,
    violations: Mutex<Vec<String>>,
}

/// Counts of what happened so far.
#[derive(Default)]
pub struct Tally {
    pub created: AtomicUsize,
    pub completed: AtomicUsize,
    /// Streams that are open now, and that were opened.
    pub open: AtomicUsize,
    pub opened: AtomicUsize,
    /// Asked for a stream and did not get one.
    pub refused: AtomicUsize,
    /// Streams that ended with `draining`.
    pub drained: AtomicUsize,
    /// Streams that broke off.
    pub broken: AtomicUsize,
    /// Calls that had to be repeated.
    pub repeated_calls: AtomicUsize,
    /// Announcements, and those of a task that the worker had heard of on an earlier stream.
    pub announced: AtomicUsize,
    pub announced_again: AtomicUsize,
    /// Of the latter, and of bytes, the most on one stream.
    pub again_max: AtomicUsize,
    pub bytes_max: AtomicUsize,
}

/// One worker.
pub struct Worker {
    pub id: String,
    pub codebases: String,
    /// Whether it claims what it hears of, if the title is `work`.
    pub acts: bool,
}

impl Crew {
    pub fn new(server: SocketAddr, comes_back: Return) -> Arc<Self> {
        Arc::new(Self {
            server,
            http: http_client().timeout(CALL_WAIT).build().unwrap(),
            comes_back,
            is_closing: AtomicBool::new(false),
            tally: Tally::default(),
            claims: Mutex::default(),
            unanswered: Mutex::default(),
            created: Mutex::default(),
            violations: Mutex::default(),
        })
    }

    fn violation(&self, what: String) {
        eprintln!("VIOLATION: {what}");
        self.violations.lock().unwrap().push(what);
    }

    /// Calls until there is an answer that says what became of it.
    async fn ask(&self, path: &str, body: &Value, key: Option<&str>) -> Answer {
        loop {
            let mut request = self.http.post(format!("http://{}{path}", self.server)).json(body);
            if let Some(key) = key {
                request = request.header("Idempotency-Key", key);
            }
            let answer = async {
                let response = request.send().await?;
                let (status, headers) = (response.status().as_u16(), response.headers().clone());
                Ok(Answer { status, headers, text: response.text().await? })
            };
            let answer: reqwest::Result<_> = answer.await;
            let why = match answer {
                Ok(answer) if ![408, 502, 503, 504].contains(&answer.status) => return answer,
                Ok(answer) => format!("{} {}", answer.status, answer.problem()),
                Err(error) if error.is_timeout() => "no answer in time".to_owned(),
                Err(_) => "cut".to_owned(),
            };
            *self.unanswered.lock().unwrap().entry(why).or_default() += 1;
            self.tally.repeated_calls.fetch_add(1, Relaxed);
            tokio::time::sleep(CALL_PAUSE).await;
        }
    }

    /// Creates tasks for these codebases in turn, so many a second, until told to stop.
    pub fn produce(self: &Arc<Self>, codebases: Vec<String>, per_second: u32) -> Producer {
        let (crew, stop) = (Arc::clone(self), Arc::new(AtomicBool::new(false)));
        let is_over = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let mut beat = tokio::time::interval(Duration::from_secs(1) / per_second);
            let mut creations = tokio::task::JoinSet::new();
            for n in 0.. {
                beat.tick().await;
                if is_over.load(Relaxed) {
                    break;
                }
                let (crew, codebase) = (Arc::clone(&crew), codebases[n % codebases.len()].clone());
                creations.spawn(async move { crew.create(n, &codebase).await });
            }
            creations.join_all().await;
        });
        Producer { task, stop }
    }

    async fn create(&self, n: usize, codebase: &str) {
        let body = json!({"title": "work", "codebase_id": codebase, "metadata": {"n": n}});
        let answer = self.ask("/v1/tasks", &body, Some(&format!("task-{n}"))).await;
        if ![200, 201].contains(&answer.status) {
            return self.violation(format!("creating: {answer:?}"));
        }
        let id = answer.json()["id"].as_str().expect("an id").to_owned();
        self.created.lock().unwrap().push(id);
        self.tally.created.fetch_add(1, Relaxed);
    }

    /// Starts workers.
    pub async fn hire(self: &Arc<Self>, workers: Vec<Worker>) -> Vec<JoinHandle<()>> {
        let mut hired = Vec::new();
        for worker in workers {
            let crew = Arc::clone(self);
            hired.push(tokio::spawn(async move { crew.work(worker).await }));
            tokio::time::sleep(START_GAP).await;
        }
        hired
    }

    async fn work(&self, worker: Worker) {
        let mut known = HashSet::new();
        let query = format!("worker_id={}", worker.id);
        let headers = format!("X-Codebases: {}\r\n", worker.codebases);
        let mut failures = 0;
        while !self.is_closing.load(Relaxed) {
            let mut wait = Duration::ZERO;
            match RawStream::open(self.server, &query, &headers).await {
                Ok(mut stream) if stream.status == 200 => {
                    failures = 0;
                    self.tally.opened.fetch_add(1, Relaxed);
                    self.tally.open.fetch_add(1, Relaxed);
                    self.follow(&worker, &mut stream, &mut known).await;
                    self.tally.open.fetch_sub(1, Relaxed);
                    wait = stream.retry;
                }
                refused => {
                    // 409: who was cut while it connected may meet itself, in one batch with its ghost.
                    if let Ok(stream) = refused
                        && ![409, 502, 503, 504].contains(&stream.status)
                    {
                        self.violation(format!("a stream was refused: {}", stream.head));
                    }
                    self.tally.refused.fetch_add(1, Relaxed);
                    wait = wait.max(FIRST_BACKOFF * 2_u32.pow(failures)).min(BACKOFF_MAX);
                    failures = (failures + 1).min(6);
                }
            }
            if self.comes_back == Return::AsTold {
                tokio::time::sleep(wait).await;
            } else {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Reads a stream to its end.
    async fn follow(&self, worker: &Worker, stream: &mut RawStream, known: &mut HashSet<String>) {
        let (mut heard, mut again, mut is_drained) = (HashSet::new(), 0, false);
        while let Some(event) = stream.read().await {
            if event.data["code"] == "draining" {
                is_drained = true;
            }
            if event.name != "task_available" {
                continue;
            }
            let task = event.task().to_owned();
            self.tally.announced.fetch_add(1, Relaxed);
            if heard.insert(task.clone()) && !known.insert(task.clone()) {
                again += 1;
            }
            if worker.acts && event.data["title"] == "work" {
                self.do_task(worker, &task).await;
            }
        }
        self.tally.announced_again.fetch_add(again, Relaxed);
        self.tally.again_max.fetch_max(again, Relaxed);
        self.tally.bytes_max.fetch_max(stream.received, Relaxed);
        let counter = if is_drained { &self.tally.drained } else { &self.tally.broken };
        counter.fetch_add(1, Relaxed);
    }

    async fn do_task(&self, worker: &Worker, task: &str) {
        let claim_id = uuid::Uuid::new_v4().to_string();
        let body = json!({"worker_id": worker.id, "claim_id": claim_id});
        let claim = self.ask(&format!("/v1/tasks/{task}/claim"), &body, None).await;
        if claim.status == 409 {
            return;
        }
        if claim.status != 200 {
            return self.violation(format!("{} claims {task}: {claim:?}", worker.id));
        }
        let epoch = claim.json()["claim_epoch"].as_i64().expect("an epoch");
        let key = (task.to_owned(), epoch);
        let other = self.claims.lock().unwrap().insert(key, worker.id.clone());
        if other.is_some() {
            self.violation(format!("epoch {epoch} of {task} was given to {other:?} too"));
        }
        let body = json!({"worker_id": worker.id, "claim_epoch": epoch, "result": worker.id});
        let done = self.ask(&format!("/v1/tasks/{task}/complete"), &body, None).await;
        if done.status != 200 {
            return self.violation(format!("{} completes {task}: {done:?}", worker.id));
        }
        self.tally.completed.fetch_add(1, Relaxed);
    }

    /// Whatever was acknowledged was done once, by one claim, of which the worker knows.
    pub async fn prove(&self, db: &TestDb) {
        let created = self.created.lock().unwrap().len();
        let undone = "select count(*) from tasks where title = 'work' and finished_at is null";
        let mut left = db.value(undone).await;
        while left != "0" {
            // However many are left: as long as they become fewer, all is well.
            left = eventually("more of the tasks are done", async || {
                let now = db.value(undone).await;
                (now != left).then_some(now)
            })
            .await;
        }
        let wrong = "select json_agg(wrong) from (
            select t.id, t.status, t.claim_epoch, count(a.*) as claims,
                   count(*) filter (where a.outcome = 'completed') as completed
              from tasks t left join attempts a on a.task_id = t.id
             where t.title = 'work'
             group by t.id
            having t.status <> 'completed' or t.claim_epoch <> 1 or count(a.*) <> 1
                or count(*) filter (where a.outcome = 'completed') <> 1
             limit 10) as wrong";
        assert_eq!(db.value(wrong).await, "", "lost, or claimed or done more than once");
        let found = db.value("select count(*) from tasks where title = 'work'").await;
        assert_eq!(found, created.to_string(), "each acknowledged task, and no other");
        eventually("the workers know of each completion", async || {
            (self.tally.completed.load(Relaxed) == created).then_some(())
        })
        .await;
        let violations = self.violations.lock().unwrap();
        assert!(violations.is_empty(), "{violations:#?}");
    }

    /// Why calls had to be repeated.
    pub fn unanswered(&self) -> String {
        let why = self.unanswered.lock().unwrap();
        let list: Vec<_> = why.iter().map(|(why, count)| format!("{why}: {count}")).collect();
        if list.is_empty() { "none".to_owned() } else { list.join(", ") }
    }

    /// Lets the workers go: those that wait for a reconnect by themselves, the others by force.
    pub fn dismiss(&self, workers: Vec<JoinHandle<()>>) {
        self.is_closing.store(true, Relaxed);
        for worker in workers {
            worker.abort();
        }
    }
}

/// A stream of new tasks.
pub struct Producer {
    task: JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl Producer {
    /// No new ones; waits until all are acknowledged.
    pub async fn stop(self) {
        self.stop.store(true, Relaxed);
        self.task.await.expect("the producer ends");
    }
}
