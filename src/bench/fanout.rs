//! Measurement 5: one task to thousands of streams, and what a task costs that is for few of them.

use std::time::Duration;

use tokio::time::sleep;

use super::client::{Connection, post, post_into, text_after};
use super::ground::Database;
use super::load::{Done, closed_loop};
use super::machine::cpu_seconds;
use super::replicas::{Server, minimal, replica};
use super::report::{Report, Row, Target};
use super::sse::{Event, Stream};
use super::streams::{open, tell};
use super::workers::{Way, stream_path};
use super::{Asked, Failure, say};

/// Tasks of one round, one after the other. Few enough that no window is ever full.
const BEATS: usize = 20;
/// Tasks of a burst: what a stream may be told before its worker is proven to have read has 40 KiB, and an
/// announcement a quarter of one. So this is the most that leaves at once, whatever the setting of the window.
const BURST: usize = 100;
/// The largest window there is.
const WINDOW: (&str, &str) = ("WORKER_SSE_WINDOW", "1000");
/// Streams of each codebase where a task is for few.
const STREAMS_PER_CODEBASE: usize = 10;
/// What the minimal server's time may be of ours.
const TIME_TARGET: f64 = 1.11;
const PACE_TARGET: f64 = 0.9;
/// What a task may cost more among ten times as many streams.
const COST_TARGET: f64 = 1.1;
/// Tasks that each of these streams is told of, at most: less than fit into a window.
const TOLD_MAX: usize = 100;
/// Connections that create where a task's cost is measured.
const PRODUCERS: usize = 4;
/// A server is left alone for so long after streams were opened.
const CALM: Duration = Duration::from_secs(3);
const NAME: &str = "fanout";

pub(super) async fn run(asked: &Asked<'_>, report: &mut Report) -> Result<(), Failure> {
    let count = asked.sizes.fanout_streams;
    let [mut ours, mut floor]: [Vec<f64>; 2] = Default::default();
    let [mut burst, mut singly, mut at_once]: [Vec<f64>; 3] = Default::default();
    let [mut few, mut many]: [Vec<f64>; 2] = Default::default();
    for round in 1..=asked.rounds {
        say(&format!("{NAME}: round {round} of {}", asked.rounds));
        let hello = minimal(asked.ground).await?;
        let database = asked.ground.database().await?;
        let server = replica(asked.ground, &database, &[WINDOW]).await?;
        floor.extend(beats(&hello, count, &Sender::Minimal).await?);
        ours.extend(beats(&server, count, &Sender::Taskwire).await?);
        singly.push(burst_of(asked, &hello, count, &Sender::Minimal).await?);
        at_once.push(burst_of(asked, &hello, count, &Sender::MinimalAtOnce).await?);
        burst.push(burst_of(asked, &server, count, &Sender::Taskwire).await?);
        server.end().await;
        hello.end().await;
        let large = asked.sizes.idle_streams;
        for (streams, costs) in [(large / 10, &mut few), (large, &mut many)] {
            let database = asked.ground.database().await?;
            costs.push(cost(asked, &database, streams).await?);
        }
    }
    let what = format!("one task to {count} streams, until the last has it");
    report.add(
        Row::new(NAME, what, "ms", ours)
            .against("minimal axum server, one shared frame", &floor)
            .target(Target::AtMost(TIME_TARGET))
            .note(format!("{BEATS} tasks a round, each from its POST: its commit is part of it")),
    );
    let what = format!("a burst of {BURST} tasks to {count} streams");
    report.add(
        Row::new(NAME, what.as_str(), "events/s", burst.clone())
            .against("minimal axum server, a frame after the other", &singly)
            .target(Target::AtLeast(PACE_TARGET))
            .note(
                "as much as a stream is told before its worker is known to have read, so no more \
                 at once; events=task_available",
            ),
    );
    report.add(
        Row::new(NAME, what, "events/s", burst)
            .against("minimal axum server, all frames at once", &at_once)
            .note("there each stream writes them all in one piece"),
    );
    let large = asked.sizes.idle_streams;
    let codebases = large / STREAMS_PER_CODEBASE;
    report.add(
        Row::new(
            NAME,
            format!(
                "a task for {STREAMS_PER_CODEBASE} of {large} streams, {codebases} codebases, CPU"
            ),
            "us/task",
            many,
        )
        .against(format!("for {STREAMS_PER_CODEBASE} of {} streams", large / 10), &few)
        .target(Target::AtMost(COST_TARGET))
        .note("CPU time of the replica, above what it takes when idle"),
    );
    Ok(())
}

/// What sends to the streams.
enum Sender {
    Taskwire,
    Minimal,
    /// In a burst every frame is there before the first is written.
    MinimalAtOnce,
}

impl Sender {
    fn path(&self, stream: usize) -> String {
        match self {
            Self::Taskwire => stream_path(&format!("bench-{stream}"), "bench", Way::Claims),
            Self::Minimal | Self::MinimalAtOnce => "/stream".to_owned(),
        }
    }
}

/// A frame like that of an announcement.
const FRAME: &str = "event: task_available\ndata: {\"task_id\":\"0192a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b\",\
    \"title\":\"bench\",\"codebase_id\":\"bench\",\"priority\":0,\"required_capabilities\":[],\
    \"created_at\":\"2026-01-01T00:00:00.000000Z\"}\n\n";

fn is_announcement(event: Event<'_>) -> bool {
    event.is("task_available")
}

/// Until the last stream has it, in ms, for each of some tasks.
async fn beats(server: &Server, count: usize, sender: &Sender) -> Result<Vec<f64>, Failure> {
    let mut streams = open(server.address, count, |stream| sender.path(stream)).await?;
    let mut connection = Connection::open(server.address).await?;
    let mut times = Vec::with_capacity(BEATS);
    for _ in 0..BEATS {
        let mut id = String::new();
        let send = async {
            let (request, status) = match sender {
                Sender::Taskwire => {
                    (post("/v1/tasks", r#"{"title":"bench","codebase_id":"bench"}"#), 201)
                }
                Sender::Minimal | Sender::MinimalAtOnce => (post("/frames/1", FRAME), 200),
            };
            let answer = connection.call(&request).await?;
            answer.expect(status)?;
            text_after(answer.body, r#""id":""#).unwrap_or_default().clone_into(&mut id);
            Ok(())
        };
        let (seconds, back) = tell(streams, 1, is_announcement, send).await?;
        times.push(seconds * 1000.0);
        streams = back;
        if !id.is_empty() {
            let cancel = post(&format!("/v1/tasks/{id}/cancel"), "{}");
            connection.call(&cancel).await?.expect(200)?;
        }
    }
    Ok(times)
}

/// Events a second, from the send to the last event of the last stream.
async fn burst_of(
    asked: &Asked<'_>,
    server: &Server,
    count: usize,
    sender: &Sender,
) -> Result<f64, Failure> {
    let streams: Vec<Stream> = open(server.address, count, |stream| sender.path(stream)).await?;
    sleep(asked.pause(CALM)).await;
    let mut connection = Connection::open(server.address).await?;
    let send = async {
        match sender {
            Sender::Taskwire => {
                let tasks = vec![r#"{"title":"bench","codebase_id":"bench"}"#; BURST].join(",");
                let request = post("/v1/tasks/batch", &format!("[{tasks}]"));
                connection.call(&request).await?.expect(201)?;
            }
            Sender::Minimal | Sender::MinimalAtOnce => {
                let how =
                    if matches!(sender, Sender::Minimal) { "frames" } else { "frames-at-once" };
                let request = post(&format!("/{how}/{BURST}"), FRAME);
                connection.call(&request).await?.expect(200)?;
            }
        }
        Ok(())
    };
    let (seconds, _) = tell(streams, BURST, is_announcement, send).await?;
    Ok((count * BURST) as f64 / seconds)
}

/// CPU time of the replica for a task that is for ten of so many streams, in microseconds.
async fn cost(asked: &Asked<'_>, database: &Database, count: usize) -> Result<f64, Failure> {
    let server = replica(asked.ground, database, &[]).await?;
    let codebases = (count / STREAMS_PER_CODEBASE).max(1);
    let path = |stream: usize| {
        let codebase = format!("bench-{}", stream % codebases);
        stream_path(&format!("bench-{stream}"), &codebase, Way::Claims)
    };
    let streams = open(server.address, count, path).await?;
    sleep(asked.pause(CALM)).await;
    let length = Duration::from_secs_f64(asked.seconds);
    // Every stream has heard of something: what it keeps is there.
    create_for_each(&server, codebases, codebases, length * 2).await?;
    sleep(asked.pause(CALM)).await;
    let used = || cpu_seconds(server.pid).ok_or("there is no /proc to read CPU time from");
    let before = used()?;
    sleep(length).await;
    let idle = used()? - before;
    let before = used()?;
    // Of so many that no window is ever full: what is held back costs nothing.
    let most = asked.sizes.idle_streams / 10 / STREAMS_PER_CODEBASE * TOLD_MAX;
    let done = create_for_each(&server, codebases, most, length).await?;
    let busy = used()? - before;
    drop(streams);
    server.end().await;
    Ok((busy - idle * done.seconds / asked.seconds) * 1e6 / done.calls as f64)
}

/// Creates so many tasks at most, for one codebase after the other.
async fn create_for_each(
    server: &Server,
    codebases: usize,
    most: usize,
    length: Duration,
) -> Result<Done, Failure> {
    closed_loop(&[server.address], PRODUCERS, length, 201, |producer| {
        let mut number = producer;
        move |request: &mut Vec<u8>| {
            let codebase = number % codebases;
            let body = format!(r#"{{"title":"bench","codebase_id":"bench-{codebase}"}}"#);
            post_into(request, "/v1/tasks", &body);
            number += PRODUCERS;
            number <= most + PRODUCERS
        }
    })
    .await
}
