//! R4: with `WORKER_SSE_FANOUT=k` a task is offered to k workers first, and to all in the end.

use std::collections::{HashMap, HashSet};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::support::{PATIENCE, Replica, SseStream, TestDb, eventually};

/// Until a task that stays unclaimed is offered to more, with some allowance: whoever was quicker has seen
/// nothing but the first offers.
const QUICK: Duration = Duration::from_millis(200);
/// Within this all have heard of a task that stays unclaimed; with an allowance for a busy machine.
const ALL_WITHIN: Duration = Duration::from_secs(5);
/// Rounds after which a machine is too slow to see anything.
const ROUNDS_MAX: usize = 300;

/// Workers that tell of whatever they hear.
struct Herd {
    heard: UnboundedReceiver<(String, String)>,
    telling: UnboundedSender<(String, String)>,
    readers: HashMap<String, JoinHandle<()>>,
}

impl Herd {
    fn new() -> Self {
        let (telling, heard) = unbounded_channel();
        Self { heard, telling, readers: HashMap::new() }
    }

    /// Workers of one replica, by names that begin alike.
    async fn of(replica: &Replica, prefix: &str, count: usize) -> Self {
        let mut herd = Self::new();
        herd.join(replica, prefix, count).await;
        herd
    }

    async fn join(&mut self, replica: &Replica, prefix: &str, count: usize) {
        for n in 0..count {
            let worker = format!("{prefix}-{n}");
            let query = format!("worker_id={worker}&events=task_available&codebases=c");
            let stream = replica.stream(&query).await;
            let reader = tokio::spawn(read(stream, worker.clone(), self.telling.clone()));
            self.readers.insert(worker, reader);
        }
        // Whoever has not read its backlog yet would be passed over, as it reads that next.
        let ready = replica.create(json!({"title": "all ready", "codebase_id": "c"})).await;
        let prefix = format!("{prefix}-");
        let mut heard = HashSet::new();
        while heard.len() < count {
            let (worker, task) = self.next().await;
            if task == ready && worker.starts_with(&prefix) {
                heard.insert(worker);
            }
        }
        replica.post(&format!("/v1/tasks/{ready}/cancel"), json!({})).await.expect(200);
    }

    /// Who hears of what next.
    async fn next(&mut self) -> (String, String) {
        timeout(PATIENCE, self.heard.recv()).await.expect("somebody hears").expect("they live")
    }

    /// Who hears of a task first.
    async fn first(&mut self, task: &str) -> String {
        loop {
            let (worker, heard) = self.next().await;
            if heard == task {
                return worker;
            }
        }
    }

    /// All who hear of a task, until so many did.
    async fn all(&mut self, task: &str, count: usize) -> HashSet<String> {
        let mut all = HashSet::new();
        while all.len() < count {
            let worker = self.first(task).await;
            assert!(all.insert(worker.clone()), "{worker} was told twice");
        }
        all
    }
}

async fn read(mut stream: SseStream, worker: String, telling: UnboundedSender<(String, String)>) {
    while let Some(event) = stream.read().await {
        if event.name == "task_available" {
            let _ = telling.send((worker.clone(), event.task().to_owned()));
        }
    }
}

async fn start(fanout: &str) -> (TestDb, Replica) {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--worker-sse-fanout", fanout]).await;
    (db, replica)
}

/// What one replica has told so far, and how often it has offered a task to more workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Told {
    announcements: u64,
    widened: u64,
}

async fn told(replicas: &[&Replica]) -> Told {
    let mut told = Told::default();
    for replica in replicas {
        let metrics = replica.get("/metrics").await.text;
        let of = |name: &str| {
            let line = metrics.lines().find_map(|line| line.strip_prefix(name));
            line.map_or(0, |count| count.trim().parse().expect("a count"))
        };
        told.announcements += of("taskwire_announcements_total ");
        told.widened += of("taskwire_fanout_total{outcome=\"widened\"} ")
            + of("taskwire_fanout_total{outcome=\"all\"} ");
    }
    told
}

/// Creates a task that is claimed once `count` workers have heard of it. How many were told; nothing where
/// it was offered to more by then.
async fn told_of_one(replicas: &[&Replica], herd: &mut Herd, count: usize) -> Option<u64> {
    let before = told(replicas).await;
    let task = replicas[0].create(json!({"title": "x", "codebase_id": "c"})).await;
    let worker = herd.all(&task, count).await.into_iter().next().unwrap();
    replicas[0].claim(&task, &worker).await.expect(200);
    replicas[0].finish("complete", &task, &worker, json!({})).await.expect(200);
    let after = told(replicas).await;
    (after.widened == before.widened).then_some(after.announcements - before.announcements)
}

#[tokio::test]
async fn r4_a_task_is_offered_to_k_of_many_workers_first() {
    let (_db, replica) = start("3").await;
    let mut herd = Herd::of(&replica, "w", 12).await;
    let mut rounds = 0;
    for _ in 0..ROUNDS_MAX {
        if let Some(told) = told_of_one(&[&replica], &mut herd, 3).await {
            assert_eq!(told, 3);
            rounds += 1;
            if rounds == 10 {
                return;
            }
        }
    }
    panic!("of {ROUNDS_MAX} tasks only {rounds} were claimed soon");
}

#[tokio::test]
async fn r4_the_rest_hear_of_it_while_it_stays_unclaimed_and_nobody_hears_twice() {
    let (_db, replica) = start("1").await;
    let mut herd = Herd::of(&replica, "w", 40).await;
    let before = told(&[&replica]).await;
    let begun = Instant::now();
    let task = replica.create(json!({"title": "x", "codebase_id": "c"})).await;
    herd.all(&task, 40).await;
    let waited = begun.elapsed();
    assert!((Duration::from_secs(1)..ALL_WITHIN).contains(&waited), "{waited:?}");
    let after = told(&[&replica]).await;
    assert_eq!(after.announcements - before.announcements, 40);
    assert_eq!(after.widened - before.widened, 6, "five times to twice as many, and to all");
}

#[tokio::test]
async fn r4_what_is_for_few_or_for_one_is_told_at_once() {
    let (_db, replica) = start("8").await;
    let mut herd = Herd::of(&replica, "w", 5).await;
    let mut able = replica.stream("worker_id=able&capabilities=rare&events=task_available").await;
    let began = Instant::now();
    let task = replica.create(json!({"title": "x", "codebase_id": "c"})).await;
    herd.all(&task, 5).await;
    assert_eq!(replica.task(&task).await["status"], "pending");
    let mine = replica.create(json!({"title": "x", "target_worker_id": "w-3"})).await;
    assert_eq!(herd.first(&mine).await, "w-3");
    let rare = replica.create(json!({"title": "x", "required_capabilities": ["rare"]})).await;
    assert_eq!(able.announced().await, rare);
    assert!(began.elapsed() < ALL_WITHIN, "{:?}", began.elapsed());
}

#[tokio::test]
async fn r4_a_claimed_task_is_never_offered_to_more() {
    let (_db, replica) = start("2").await;
    let mut herd = Herd::of(&replica, "w", 10).await;
    let mut quick = HashSet::new();
    for _ in 0..20 {
        let begun = Instant::now();
        let task = replica.create(json!({"title": "x", "codebase_id": "c"})).await;
        replica.register("claimer", &["c"], &[]).await;
        replica.claim(&task, "claimer").await.expect(200);
        if begun.elapsed() < QUICK {
            quick.insert(task);
        }
    }
    assert!(!quick.is_empty(), "the machine is too slow to see it");
    // Whatever is due has had its turn before one that came later.
    let last = replica.create(json!({"title": "last", "codebase_id": "c"})).await;
    let mut counts: HashMap<String, usize> = HashMap::new();
    while counts.get(&last).is_none_or(|count| *count < 10) {
        let (_, task) = herd.next().await;
        *counts.entry(task).or_default() += 1;
    }
    for task in quick {
        assert!(counts.get(&task).is_none_or(|count| *count <= 2), "{task}: {counts:?}");
    }
}

#[tokio::test]
async fn r4_two_replicas_share_k() {
    let db = TestDb::new().await;
    let flags = ["--worker-sse-fanout", "4"];
    let (a, b) = (Replica::start_with(&db, &flags).await, Replica::start_with(&db, &flags).await);
    let mut herd = Herd::of(&a, "a", 10).await;
    herd.join(&b, "b", 10).await;
    // It takes a second or two until each knows of the other's streams.
    let replicas = [&a, &b];
    let mut shared = 0;
    for _ in 0..ROUNDS_MAX {
        match told_of_one(&replicas, &mut herd, 4).await {
            Some(4) => shared += 1,
            // Until then there are too many, never too few.
            Some(told) => {
                assert!((4..=8).contains(&told), "{told}");
                shared = 0;
            }
            None => {}
        }
        if shared == 20 {
            return;
        }
    }
    panic!("{shared} of {ROUNDS_MAX} tasks were told to four workers");
}

#[tokio::test]
async fn r4_tasks_spread_over_the_workers() {
    let (_db, replica) = start("1").await;
    let mut herd = Herd::of(&replica, "w", 10).await;
    let mut first: HashMap<String, usize> = HashMap::new();
    for _ in 0..200 {
        let task = replica.create(json!({"title": "x", "codebase_id": "c"})).await;
        let worker = herd.first(&task).await;
        replica.claim(&task, &worker).await.expect(200);
        replica.finish("complete", &task, &worker, json!({})).await.expect(200);
        *first.entry(worker).or_default() += 1;
    }
    assert!(first.len() == 10 && first.values().all(|count| *count >= 4), "{first:?}");
}

#[tokio::test]
async fn r4_who_holds_a_task_is_asked_after_those_who_hold_none() {
    let (_db, replica) = start("1").await;
    let mut herd = Herd::of(&replica, "w", 6).await;
    for n in 0..5 {
        let body = json!({"title": "long", "target_worker_id": format!("w-{n}")});
        let task = replica.create(body).await;
        assert_eq!(herd.first(&task).await, format!("w-{n}"));
        replica.claim(&task, &format!("w-{n}")).await.expect(200);
    }
    // As soon as it is known who is busy, the only idle one gets everything.
    let mut in_a_row = 0;
    for _ in 0..ROUNDS_MAX {
        let task = replica.create(json!({"title": "short", "codebase_id": "c"})).await;
        let worker = herd.first(&task).await;
        replica.claim(&task, &worker).await.expect(200);
        replica.finish("complete", &task, &worker, json!({})).await.expect(200);
        in_a_row = if worker == "w-5" { in_a_row + 1 } else { 0 };
        if in_a_row == 20 {
            return;
        }
    }
    panic!("{in_a_row} in a row");
}

#[tokio::test]
async fn r4_first_choices_that_ignore_it_or_die_do_not_strand_a_task() {
    let db = TestDb::new().await;
    let flags = ["--worker-sse-fanout", "1"];
    let (a, b) = (Replica::start_with(&db, &flags).await, Replica::start_with(&db, &flags).await);
    let mut herd = Herd::of(&a, "a", 4).await;
    // Who was told leaves: somebody else hears, and so on to the last one.
    let task = a.create(json!({"title": "x", "codebase_id": "c"})).await;
    let mut left = HashSet::new();
    while left.len() < 4 {
        let begun = Instant::now();
        let worker = herd.first(&task).await;
        assert!(begun.elapsed() < ALL_WITHIN, "{:?}", begun.elapsed());
        herd.readers.remove(&worker).unwrap().abort();
        left.insert(worker);
    }
    // Who comes now hears of it from its backlog.
    let mut late = b.stream("worker_id=late&codebases=c&events=task_available").await;
    assert_eq!(late.announced().await, task);
    b.claim(&task, "late").await.expect(200);
    // The replica dies that offered it, or was to.
    let mut others = Herd::of(&b, "b", 4).await;
    let mut doomed = Herd::of(&a, "c", 4).await;
    let next = a.create(json!({"title": "next", "codebase_id": "c"})).await;
    doomed.readers.drain().for_each(|(_, reader)| reader.abort());
    a.kill();
    let begun = Instant::now();
    others.all(&next, 4).await;
    assert!(begun.elapsed() < ALL_WITHIN, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn r4_a_refusal_has_it_offered_to_more_at_once() {
    let (_db, replica) = start("1").await;
    let mut herd = Herd::of(&replica, "w", 6).await;
    for _ in 0..ROUNDS_MAX {
        let before = told(&[&replica]).await;
        let begun = Instant::now();
        let task = replica.create(json!({"title": "x", "codebase_id": "c"})).await;
        let worker = herd.first(&task).await;
        assert_eq!(replica.claim(&task, "stranger").await.problem(), "unknown_worker");
        eventually("it is offered to more", async || {
            (told(&[&replica]).await.widened > before.widened).then_some(())
        })
        .await;
        let waited = begun.elapsed();
        replica.claim(&task, &worker).await.expect(200);
        replica.finish("complete", &task, &worker, json!({})).await.expect(200);
        if waited < QUICK {
            return;
        }
    }
    panic!("it was never offered to more before its time");
}

#[tokio::test]
async fn r4_calls_that_wait_are_woken_as_before() {
    let (_db, replica) = start("1").await;
    let _herd = Herd::of(&replica, "w", 5).await;
    replica.register("waiter", &["c"], &[]).await;
    let wait = replica.post("/v1/tasks/claim", json!({"worker_id": "waiter", "wait": 20}));
    let create = async {
        eventually("it waits", async || {
            replica.log().contains("path=\"/v1/agent/workers/register\"").then_some(())
        })
        .await;
        replica.create(json!({"title": "x", "codebase_id": "c"})).await
    };
    let begun = Instant::now();
    let (answer, task) = tokio::join!(wait, create);
    assert_eq!(answer.expect(200)["tasks"][0]["id"], task.as_str());
    assert!(begun.elapsed() < ALL_WITHIN, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn r4_by_default_all_hear_at_once_and_nothing_is_counted() {
    let db = TestDb::new().await;
    for flags in [&[][..], &["--worker-sse-fanout", "all"]] {
        let replica = Replica::start_with(&db, flags).await;
        let mut herd = Herd::of(&replica, "w", 20).await;
        let before = told(&[&replica]).await;
        let task = replica.create(json!({"title": "x", "codebase_id": "c"})).await;
        herd.all(&task, 20).await;
        let after = told(&[&replica]).await;
        assert_eq!(after.announcements - before.announcements, 20);
        assert!(!replica.get("/metrics").await.text.contains("taskwire_fanout_total"));
        replica.post(&format!("/v1/tasks/{task}/cancel"), json!({})).await.expect(200);
    }
}

#[test]
fn r4_a_fanout_that_is_no_number_of_workers_stops_the_start_with_a_sentence() {
    for wrong in ["0", "1001", "some", "2.5", "3 4"] {
        let by_flag = ["serve", "--worker-sse-fanout", wrong];
        let by_flag = Command::new(env!("CARGO_BIN_EXE_taskwire")).args(by_flag).output();
        let mut by_variable = Command::new(env!("CARGO_BIN_EXE_taskwire"));
        let by_variable = by_variable.arg("serve").env("WORKER_SSE_FANOUT", wrong).output();
        for done in [by_flag.unwrap(), by_variable.unwrap()] {
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(!done.status.success());
            assert!(said.contains("WORKER_SSE_FANOUT") && said.contains("1 to 1000"), "{said}");
        }
    }
}
