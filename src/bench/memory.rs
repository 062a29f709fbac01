//! Measurement 6: what an idle stream costs.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::machine::{cpu_seconds, resident_kib};
use super::replicas::{Server, minimal, replica};
use super::report::{Report, Row, Target};
use super::sse::Stream;
use super::streams::open;
use super::workers::{Way, stream_path};
use super::{Asked, Failure, say};

/// Streams that are opened and closed before anything is measured: what the first ones bring with them is
/// no stream's cost.
const FIRST_STREAMS: usize = 64;
/// A server is left alone for so long before its memory is read.
const CALM: Duration = Duration::from_secs(3);
/// How much longer CPU time is watched than other figures: an idle server takes little of it.
const CPU_TIMES: f64 = 6.0;
const KIB_TARGET: f64 = 10.0;
const CPU_TARGET_PERCENT: f64 = 3.0;
const NAME: &str = "memory";

pub(super) async fn run(asked: &Asked<'_>, report: &mut Report) -> Result<(), Failure> {
    let count = asked.sizes.idle_streams;
    let [mut floor, mut ours, mut cpu, mut none]: [Vec<f64>; 4] = Default::default();
    for round in 1..=asked.rounds {
        say(&format!("{NAME}: round {round} of {}", asked.rounds));
        let hello = minimal(asked.ground).await?;
        let (kib, streams) = stream_kib(asked, &hello, count, |_| "/stream".to_owned()).await?;
        floor.push(kib);
        drop(streams);
        hello.end().await;
        let database = asked.ground.database().await?;
        let server = replica(asked.ground, &database, &[]).await?;
        let length = Duration::from_secs_f64(asked.seconds * CPU_TIMES);
        none.push(cpu_percent(&server, length).await?);
        let path = |stream| stream_path(&format!("bench-{stream}"), "bench", Way::Claims);
        let (kib, streams) = stream_kib(asked, &server, count, path).await?;
        ours.push(kib);
        cpu.push(cpu_percent(&server, length).await?);
        drop(streams);
        server.end().await;
    }
    report.add(
        Row::new(NAME, format!("resident memory of an idle stream, of {count}"), "KiB", ours)
            .against("minimal axum server", &floor)
            .absolute_target(Target::AtMost(KIB_TARGET)),
    );
    report.add(
        Row::new(NAME, format!("CPU of a replica with {count} idle streams"), "% of a core", cpu)
            .against("without streams", &none)
            .absolute_target(Target::AtMost(CPU_TARGET_PERCENT)),
    );
    Ok(())
}

async fn stream_kib(
    asked: &Asked<'_>,
    server: &Server,
    count: usize,
    path: impl Fn(usize) -> String,
) -> Result<(f64, Vec<Stream>), Failure> {
    let resident = || resident_kib(server.pid).ok_or("there is no /proc to read memory from");
    drop(open(server.address, FIRST_STREAMS, &path).await?);
    sleep(asked.pause(CALM)).await;
    let before = resident()?;
    let streams = open(server.address, count, &path).await?;
    sleep(asked.pause(CALM)).await;
    Ok(((resident()? - before) / count as f64, streams))
}

async fn cpu_percent(server: &Server, length: Duration) -> Result<f64, Failure> {
    let used = || cpu_seconds(server.pid).ok_or("there is no /proc to read CPU time from");
    let (before, begun) = (used()?, Instant::now());
    sleep(length).await;
    Ok((used()? - before) / begun.elapsed().as_secs_f64() * 100.0)
}
