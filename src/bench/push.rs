//! Measurement 1: from a task's POST on one replica to its announcement read on another, idle.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::timeout;

use super::client::{Connection, post};
use super::figures::Latencies;
use super::floors::Floors;
use super::replicas::{Server, end_all, replicas};
use super::report::{Report, Row, Target};
use super::schedule::Schedule;
use super::sse::Stream;
use super::{Asked, Failure, say};

/// Tasks a second: few enough that each finds everything idle.
const PER_SECOND: f64 = 20.0;
/// What p50 and p99 may be of the floor's.
const P50_TARGET: f64 = 1.5;
const P99_TARGET: f64 = 3.0;
/// How long an announcement may take.
const ARRIVAL_DEADLINE: Duration = Duration::from_secs(10);
const NAME: &str = "push";

pub(super) async fn run(asked: &Asked<'_>, report: &mut Report) -> Result<(), Failure> {
    let floors = Floors::prepare(asked.ground).await?;
    let database = asked.ground.database().await?;
    let servers = replicas(asked.ground, &database, 2, &[]).await?;
    let (mut floor, mut ours): ([Vec<f64>; 2], [Vec<f64>; 3]) = Default::default();
    let mut count = 0;
    for round in 1..=asked.rounds {
        say(&format!("{NAME}: round {round} of {}", asked.rounds));
        let heard = floors.notify(&mut Schedule::new(PER_SECOND, asked.seconds)).await?;
        floor[0].push(heard.p50_ms());
        floor[1].push(heard.p99_ms());
        let Wait { heard, .. } = pushes(&servers[0], &servers[1], asked.seconds).await?;
        count += heard.len();
        ours[0].push(heard.p50_ms());
        ours[1].push(heard.p99_ms());
        ours[2].push(heard.max_ms());
    }
    let what = "POST sent on A to task_available read on B";
    let [p50, p99, max] = ours;
    report.add(
        Row::new(NAME, format!("{what}, p50"), "ms", p50)
            .against("INSERT sent to NOTIFY received, p50", &floor[0])
            .target(Target::AtMost(P50_TARGET))
            .note(format!("{count} tasks in all, {PER_SECOND}/s with jitter, open loop")),
    );
    report.add(
        Row::new(NAME, format!("{what}, p99"), "ms", p99)
            .against("INSERT sent to NOTIFY received, p99", &floor[1])
            .target(Target::AtMost(P99_TARGET)),
    );
    report.add(Row::new(NAME, format!("{what}, max"), "ms", max));
    end_all(servers).await;
    Ok(())
}

/// How long tasks waited.
#[derive(Debug)]
pub(super) struct Wait {
    /// From the POST sent until the worker read of it.
    pub(super) heard: Latencies,
    /// And until its claim was answered: it could begin.
    pub(super) claimed: Latencies,
}

/// Creates tasks on one replica; a worker reads of each on the other, claims it and completes it.
pub(super) async fn pushes(from: &Server, to: &Server, seconds: f64) -> Result<Wait, Failure> {
    let path = "/v1/worker/tasks/stream?worker_id=bench-listener&codebases=bench";
    let mut stream = Stream::open(to.address, path).await?;
    let mut worker = Connection::open(to.address).await?;
    let mut producer = Connection::open(from.address).await?;
    let (arrived, mut arrivals) = mpsc::unbounded_channel();
    let ends = Arc::new(AtomicBool::new(false));
    let has_ended = Arc::clone(&ends);
    // One task at a time: the worker hears, claims, completes, and is idle again before the next.
    let reading = tokio::spawn(async move {
        let mut heard = Vec::new();
        while !has_ended.load(Ordering::Relaxed) {
            stream
                .read(|event| {
                    if event.is("task_available") {
                        heard.push((Instant::now(), event.data.to_vec()));
                    }
                })
                .await?;
            for (at, data) in heard.drain(..) {
                let _ = arrived.send((at, data));
            }
        }
        Ok::<_, io::Error>(())
    });
    let (mut heard, mut claimed) = (Vec::new(), Vec::new());
    let mut schedule = Schedule::new(PER_SECOND, seconds);
    let mut number: usize = 0;
    let result = async {
        while let Some(due) = schedule.next().await {
            number += 1;
            let title = format!("push-{number}.");
            let body = format!(r#"{{"title":"{title}","codebase_id":"bench"}}"#);
            let request = post("/v1/tasks", &body);
            // Who is late because the last one took long counts from when it was meant to go.
            let now = Instant::now();
            let sent = if now - due > LATE { due } else { now };
            producer.call(&request).await?.expect(201)?;
            let (at, data) = timeout(ARRIVAL_DEADLINE, arrivals.recv())
                .await
                .map_err(|_| "an announcement did not come")?
                .ok_or("the stream ended")?;
            if memchr::memmem::find(&data, title.as_bytes()).is_none() {
                return Err("an announcement of another task came".into());
            }
            heard.push(at.duration_since(sent));
            let id = super::client::text_after(&data, r#""task_id":""#).unwrap_or_default();
            let claim = post(&format!("/v1/tasks/{id}/claim"), r#"{"worker_id":"bench-listener"}"#);
            worker.call(&claim).await?.expect(200)?;
            claimed.push(sent.elapsed());
            let end =
                post(&format!("/v1/tasks/{id}/complete"), r#"{"worker_id":"bench-listener"}"#);
            worker.call(&end).await?.expect(200)?;
        }
        Ok::<_, Failure>(())
    }
    .await;
    ends.store(true, Ordering::Relaxed);
    reading.abort();
    result?;
    Ok(Wait { heard: Latencies::new(heard), claimed: Latencies::new(claimed) })
}

/// Later than this the sender was held up.
const LATE: Duration = Duration::from_micros(500);
