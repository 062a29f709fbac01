//! P3 (protocol C1): one task, one winner.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use super::caller::http;
use super::{Campaign, percentile};
use crate::support::{Replica, TestDb};

/// What one racer was told, and after how long.
type Finish = (u16, serde_json::Value, Duration);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p3_c1_of_racers_over_all_replicas_exactly_one_wins_each_task() {
    let campaign = Campaign::new("p3_c1_of_racers");
    let racers = campaign.number("RACERS", 100);
    let tasks = campaign.number("RACES", 50);
    let db = TestDb::new().await;
    let mut replicas = Vec::new();
    for _ in 0..campaign.number("REPLICAS", 3) {
        replicas.push(Replica::start(&db).await);
    }
    db.execute(&format!(
        "insert into workers (id, name) select 'racer-' || n, 'racer' from generate_series(0, {racers}) as n"
    ))
    .await;
    let (http, mut losers, mut winners) = (http(), Vec::new(), BTreeMap::new());
    for race in 0..tasks {
        let id = replicas[race % replicas.len()].create(json!({"title": "race"})).await;
        let barrier = Arc::new(Barrier::new(racers));
        let mut running = JoinSet::new();
        for n in 0..racers {
            let server = &replicas[(n + race) % replicas.len()].url;
            let body = json!({"worker_id": format!("racer-{n}")});
            let request = http.post(format!("{server}/v1/tasks/{id}/claim")).json(&body);
            let barrier = Arc::clone(&barrier);
            running.spawn(async move {
                barrier.wait().await;
                let begun = Instant::now();
                let response = request.send().await.expect("an answer");
                let status = response.status().as_u16();
                let finish: Finish =
                    (status, response.json().await.expect("whole"), begun.elapsed());
                finish
            });
        }
        let finishes = running.join_all().await;
        let won: Vec<_> = finishes.iter().filter(|(status, ..)| *status == 200).collect();
        assert_eq!(won.len(), 1, "task {race}: {won:?}");
        let winner = won[0].1["claimed_by"].as_str().unwrap().to_owned();
        let task = replicas[0].task(&id).await;
        assert_eq!((&task["claimed_by"], &task["claim_epoch"]), (&json!(winner), &json!(1)));
        *winners.entry(winner).or_insert(0) += 1;
        for (status, body, took) in finishes.into_iter().filter(|(status, ..)| *status != 200) {
            assert_eq!((status, &body["code"]), (409, &json!("already_claimed")), "{body}");
            losers.push(took);
        }
    }
    let sound = replicas.iter().map(async |replica| replica.get("/metrics").await.text);
    assert!(join_all(sound).await.iter().all(|metrics| !metrics.contains("status=\"500\"")));
    let [p50, p99] = [0.5, 0.99].map(|share| percentile(&mut losers, share));
    campaign.figures(&format!(
        "{} claims of {tasks} tasks by {racers} racers over {} replicas, {tasks} won ({} racers won), \
         {} lost; losers' p50 {p50:.1?}, p99 {p99:.1?}",
        racers * tasks,
        replicas.len(),
        winners.len(),
        losers.len(),
    ));
}
