//! Simulated workers. One that crashes forgets everything it held; one that is paused does nothing,
//! as after SIGSTOP, and goes on with what it believes to hold.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::RngExt;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::caller::Caller;
use super::ledger::{Ledger, result};
use super::producers::GROUPS;
use crate::support::{Answer, SseStream};

/// A worker with nothing new to read works on what it holds.
const IDLE: Duration = Duration::from_millis(200);
/// Claims that a worker takes before it works on them, at most.
const HELD_MAX: usize = 4;

/// The hand that a fault has on a worker.
#[derive(Default)]
pub struct Control {
    crash: Notify,
    pause_until: Mutex<Option<Instant>>,
    is_closing: AtomicBool,
}

impl Control {
    pub fn crash(&self) {
        self.crash.notify_waiters();
    }

    pub fn pause(&self, pause: Duration) {
        *self.pause_until.lock().unwrap() = Some(Instant::now() + pause);
    }

    /// Ends the worker after what it is at.
    pub fn close(&self) {
        self.is_closing.store(true, Ordering::Relaxed);
    }

    pub fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Relaxed)
    }

    fn pause_left(&self) -> Option<Duration> {
        let until = *self.pause_until.lock().unwrap();
        until.map(|until| until.saturating_duration_since(Instant::now())).filter(|d| !d.is_zero())
    }
}

/// One worker, through all its lives.
pub struct Worker {
    pub n: usize,
    pub has_stream: bool,
    pub caller: Caller,
    pub ledger: Arc<Ledger>,
    pub control: Arc<Control>,
    pub streams: reqwest::Client,
}

/// What a crash destroys.
struct Life {
    id: String,
    stream: Option<SseStream>,
    held: Vec<(String, i64)>,
}

impl Worker {
    /// Works until it is closed.
    pub async fn run(mut self) {
        let mut id = format!("w-{}", self.n);
        for life in 1.. {
            let control = Arc::clone(&self.control);
            tokio::select! {
                () = self.live(id.clone()) => return,
                () = control.crash.notified() => {}
            }
            if self.caller.chance(50) {
                id = format!("w-{}-{life}", self.n);
            } else {
                // Under its old name it first gives back what it forgot.
                let path = format!("/v1/agent/workers/{id}/unregister");
                self.caller.ask(&path, &json!({}), None).await;
            }
        }
    }

    /// Its own group, and without a stream another one.
    fn codebases(&self) -> Vec<String> {
        let more = if self.has_stream { 1 } else { 2 };
        (self.n..self.n + more).map(|group| format!("group-{}", group % GROUPS)).collect()
    }

    async fn live(&mut self, id: String) {
        let mut life = Life { id, stream: None, held: Vec::new() };
        if !self.has_stream {
            self.register(&life.id).await;
        }
        while !self.control.is_closing() {
            self.awake(&mut life).await;
            let is_idle = if self.has_stream {
                !self.hear(&mut life).await
            } else {
                !self.look(&mut life).await
            };
            if is_idle || life.held.len() >= HELD_MAX || self.caller.chance(70) {
                for (task, epoch) in std::mem::take(&mut life.held) {
                    self.work(&mut life, &task, epoch).await;
                }
            }
            if is_idle && !self.has_stream {
                self.caller.pause(20, 100).await;
            }
        }
    }

    /// Returns when the worker is not paused. One that sleeps has lost its connection by then.
    async fn awake(&self, life: &mut Life) {
        while let Some(left) = self.control.pause_left() {
            life.stream = None;
            tokio::time::sleep(left).await;
        }
    }

    async fn register(&mut self, id: &str) {
        let body = json!({"worker_id": id, "name": id, "codebases": self.codebases()});
        self.caller.ask("/v1/agent/workers/register", &body, None).await;
    }

    /// Reads one event. Whether there was one.
    async fn hear(&mut self, life: &mut Life) -> bool {
        let Some(stream) = &mut life.stream else {
            let slot = self.caller.rng.random_range(0..self.caller.fleet.slots.len());
            let server = format!("http://{}", self.caller.fleet.slots[slot].streams.address);
            let query = format!(
                "worker_id={}&events=task_available&codebases={}",
                life.id,
                self.codebases().join(",")
            );
            life.stream = SseStream::try_open(&self.streams, &server, &query).await;
            if life.stream.is_none() {
                self.caller.pause(50, 300).await;
            } else {
                self.caller.fleet.tally.connects.fetch_add(1, Ordering::Relaxed);
            }
            return true;
        };
        match tokio::time::timeout(IDLE, stream.read()).await {
            Err(_) => return false,
            Ok(None) => life.stream = None,
            Ok(Some(event)) if event.name == "task_available" => {
                let task = event.task().to_owned();
                self.claim(life, &task).await;
            }
            // By its own ghost: a connect that it gave up while the replica was stopped.
            Ok(Some(event)) if event.data["code"] == "superseded" => self.ledger.superseded(),
            Ok(Some(_)) => {}
        }
        true
    }

    async fn claim(&mut self, life: &mut Life, task: &str) {
        self.awake(life).await;
        self.ledger.claim_asked(task);
        let claim_id = self.caller.uuid();
        let body = json!({"worker_id": life.id, "claim_id": claim_id});
        let answers = self.caller.ask(&format!("/v1/tasks/{task}/claim"), &body, None).await;
        self.claims(life, &claim_id, &answers, |body| vec![body]);
    }

    /// Claims what is best, without a stream. Whether it got any.
    async fn look(&mut self, life: &mut Life) -> bool {
        let (claim_id, n) = (self.caller.uuid(), self.caller.rng.random_range(1..=HELD_MAX));
        let wait = self.caller.rng.random_range(0..=1);
        self.ledger.claim_of_any_asked(&claim_id);
        let body = json!({"worker_id": life.id, "claim_id": claim_id, "n": n, "wait": wait});
        let answers = self.caller.ask("/v1/tasks/claim", &body, None).await;
        self.claims(life, &claim_id, &answers, |body| {
            body["tasks"].as_array().cloned().unwrap_or_default()
        });
        self.ledger.claim_of_any_answered(&claim_id);
        !life.held.is_empty()
    }

    /// Notes what was won. Every answer to one call gives the same.
    fn claims(
        &self,
        life: &mut Life,
        claim_id: &str,
        answers: &[Answer],
        tasks: impl Fn(Value) -> Vec<Value>,
    ) {
        let mut won: Vec<(String, i64)> = Vec::new();
        for answer in answers.iter().filter(|answer| answer.status == 200) {
            for task in tasks(answer.json()) {
                let (id, epoch) = (task["id"].as_str().unwrap_or_default(), &task["claim_epoch"]);
                let epoch = epoch.as_i64().unwrap_or_default();
                self.ledger.claimed(id, epoch, &life.id, claim_id);
                won.push((id.to_owned(), epoch));
            }
        }
        for answer in answers.iter().filter(|answer| matches!(answer.status, 403 | 404)) {
            // A worker that waits to be heard of again is told so; a task that is gone is a fault.
            if answer.status == 404 || answer.problem() != "unknown_worker" {
                self.ledger.violation(format!("claim by {}: {answer:?}", life.id));
            }
        }
        won.sort();
        won.dedup();
        life.held.extend(won);
    }

    async fn work(&mut self, life: &mut Life, task: &str, epoch: i64) {
        if self.caller.chance(2) {
            for _ in 0..self.caller.rng.random_range(1..=4) {
                self.caller.pause(300, 500).await;
                self.awake(life).await;
                self.heartbeat(life, task, epoch).await;
            }
        } else {
            self.caller.pause(0, 5).await;
        }
        self.awake(life).await;
        let mut body = json!({"worker_id": life.id, "claim_epoch": epoch});
        let verb = match self.caller.rng.random_range(0..100) {
            0..3 => {
                body["error"] = json!("on purpose");
                body["retry_after_seconds"] = json!(self.caller.rng.random_range(0.0..1.0));
                "fail"
            }
            3..6 => "release",
            _ => {
                body["result"] = result(task, epoch, &life.id);
                self.ledger.completion_sent(task, epoch, &life.id);
                "complete"
            }
        };
        let answers = self.caller.ask(&format!("/v1/tasks/{task}/{verb}"), &body, None).await;
        let done = answers.iter().filter(|answer| answer.status == 200).count();
        if verb == "complete" && done > 0 {
            self.ledger.completed(task, epoch);
            if done < answers.len() {
                self.ledger.violation(format!("one call, two outcomes: {answers:?}"));
            }
        }
        for answer in answers.iter().filter(|answer| answer.status != 200) {
            if answer.status != 409 || answer.problem() != "claim_lost" {
                self.ledger.violation(format!("{verb} by {}: {answer:?}", life.id));
            }
            self.ledger.claim_lost();
        }
    }

    async fn heartbeat(&mut self, life: &Life, task: &str, epoch: i64) {
        let body = json!({"worker_id": life.id, "claim_epoch": epoch, "progress": 0.5});
        let path = format!("/v1/tasks/{task}/heartbeat");
        for answer in self.caller.once(&path, &body, None).await {
            if answer.status != 200 && answer.problem() != "claim_lost" {
                self.ledger.violation(format!("heartbeat of {}: {answer:?}", life.id));
            }
        }
    }
}
