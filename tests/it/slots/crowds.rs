//! Many tasks, several workers, with slots and without.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::task::JoinHandle;

use crate::support::{PATIENCE, Replica, SseStream, TestDb, eventually, http_client};

/// How long a crowd may take.
const DONE_WITHIN: Duration = Duration::from_mins(1);

/// Workers that complete all that they are given, over all replicas in turn.
pub(super) struct Crew {
    client: reqwest::Client,
    urls: Vec<String>,
    /// How often each task was completed.
    done: Arc<Mutex<HashMap<String, usize>>>,
    turn: Arc<Mutex<usize>>,
}

impl Crew {
    pub(super) fn new(replicas: &[Replica]) -> Self {
        let urls = replicas.iter().map(|replica| replica.url.clone()).collect();
        let client = http_client().timeout(PATIENCE).build().unwrap();
        Self { client, urls, done: Arc::default(), turn: Arc::default() }
    }

    /// Works through a stream until it ends: with slots if its tasks come claimed.
    pub(super) fn work(&self, mut stream: SseStream) -> JoinHandle<()> {
        let worker = stream.worker_id.clone();
        let this = self.clone();
        tokio::spawn(async move {
            while let Some(event) = stream.read().await {
                let (this, worker) = (this.clone(), worker.clone());
                match event.name.as_str() {
                    "task" if event.data["status"] == "running" => {
                        tokio::spawn(async move {
                            let epoch = event.data["claim_epoch"].as_i64().unwrap();
                            this.complete(event.task(), &worker, epoch).await;
                        });
                    }
                    "task_available" => {
                        let path = format!("/v1/tasks/{}/claim?worker_id={worker}", event.task());
                        let Some((200, claim)) = this.call(&path, &json!({})).await else {
                            continue;
                        };
                        let epoch = claim["claim_epoch"].as_i64().unwrap();
                        this.complete(event.task(), &worker, epoch).await;
                    }
                    _ => {}
                }
            }
        })
    }

    async fn complete(&self, task: &str, worker: &str, epoch: i64) {
        let path = format!("/v1/tasks/{task}/complete");
        let body = json!({"worker_id": worker, "claim_epoch": epoch});
        loop {
            match self.call(&path, &body).await {
                Some((200, _)) => {
                    break *self.done.lock().unwrap().entry(task.to_owned()).or_default() += 1;
                }
                Some((status, _)) if status < 500 => break,
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn call(&self, path: &str, body: &serde_json::Value) -> Option<(u16, serde_json::Value)> {
        let turn = {
            let mut turn = self.turn.lock().unwrap();
            *turn += 1;
            *turn % self.urls.len()
        };
        let url = format!("{}{path}", self.urls[turn]);
        let response = self.client.post(url).json(body).send().await.ok()?;
        Some((response.status().as_u16(), response.json().await.ok()?))
    }

    /// Waits until so many tasks are done, each by one claim.
    pub(super) async fn until_done(&self, db: &TestDb, count: usize) {
        let begun = Instant::now();
        while db.value("select count(*) from tasks where status = 'completed'").await
            != count.to_string()
        {
            let left = "select string_agg(status || ' ' || coalesce(claimed_by, '') || ' ' || attempt, ', ')
                          from (select * from tasks where status <> 'completed' limit 20) as t";
            assert!(begun.elapsed() < DONE_WITHIN, "left: {}", db.value(left).await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let twice = "select count(*) from attempts where outcome = 'completed'";
        assert_eq!(db.value(twice).await, count.to_string());
    }
}

impl Clone for Crew {
    fn clone(&self) -> Self {
        let (client, urls) = (self.client.clone(), self.urls.clone());
        Self { client, urls, done: Arc::clone(&self.done), turn: Arc::clone(&self.turn) }
    }
}

#[tokio::test]
async fn slots_and_plain_workers_share_a_queue_without_loss() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let crew = Crew::new(&replicas);
    for n in 0..8 {
        let slots = if n % 4 < 2 { format!("&slots={}", 1 + n * 2) } else { String::new() };
        let query = format!("worker_id=w{n}{slots}");
        crew.work(replicas[n % 2].stream(&query).await);
    }
    for n in 0..30 {
        let sql = "insert into tasks (title, priority) select 'x', n % 3 from generate_series(1, 15) as n";
        db.execute(sql).await;
        replicas[n % 2]
            .create(json!({"title": "one", "target_worker_id": format!("w{}", n % 8)}))
            .await;
    }
    crew.until_done(&db, 480).await;
    assert_eq!(db.value("select count(*) from tasks where attempt <> 1").await, "0");
    assert_eq!(
        db.value("select count(*) from tasks where target_worker_id <> claimed_by").await,
        "0"
    );
}

#[tokio::test]
async fn a_backlog_drains_through_slots() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await];
    db.execute("insert into tasks (title) select 'x' from generate_series(1, 2000)").await;
    let crew = Crew::new(&replicas);
    let begun = Instant::now();
    crew.work(replicas[0].stream("worker_id=w&slots=200").await);
    crew.until_done(&db, 2000).await;
    eprintln!("2,000 tasks in {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(30));
    let text = replicas[0].get("/metrics").await.text;
    assert!(text.contains("claims_total{outcome=\"assigned\"} 2000"), "{text}");
}

#[tokio::test]
async fn new_tasks_go_to_whoever_has_the_most_free_slots() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut streams = Vec::new();
    for n in 0..4 {
        streams.push(replica.stream(&format!("worker_id=w{n}&slots=3")).await);
    }
    // Each worker's slots are known to be free.
    eventually("the backlogs are read", || async {
        let metrics = replica.get("/metrics").await.text;
        metrics.contains("backlog_reads_total 4").then_some(())
    })
    .await;
    for _ in 0..8 {
        replica.create(json!({"title": "x"})).await;
    }
    eventually("all run", || async {
        (db.value("select count(*) from tasks where status = 'running'").await == "8").then_some(())
    })
    .await;
    let shares = "select string_agg(n::text, ' ') from (select count(*) as n from tasks group by claimed_by) as t";
    assert_eq!(db.value(shares).await, "2 2 2 2");
}
