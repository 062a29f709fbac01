//! Measurement 4: the whole life of a task: created, pushed, claimed, completed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::claims::whole;
use super::drain;
use super::figures::median;
use super::floors::{Floors, Table};
use super::machine::cpu_seconds;
use super::replicas::{NotStarted, Server, end_all, replicas};
use super::report::{Report, Row, Target};
use super::streams;
use super::workers::{Ledger, Way, produce, stream_path, work};
use super::{Asked, Failure, NOT_IN_THIS_BUILD, say};

/// Tasks that are created and not completed yet, for each worker.
const IN_FLIGHT_PER_WORKER: usize = 2;
/// Connections that create.
const PRODUCERS: usize = 32;
/// What is left out of a measurement at its beginning.
const WARM_UP: Duration = Duration::from_secs(1);
/// What slots should reach of claims.
const SLOTS_TARGET: f64 = 2.0;
/// How long a fleet may take to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
const NAME: &str = "life";

/// A way to hand tasks out.
#[derive(Clone, Copy, Debug)]
struct Variant {
    what: &'static str,
    way: Way,
    fanout: Option<&'static str>,
    /// Each worker has a codebase of its own.
    apart: bool,
}

const VARIANTS: [Variant; 4] = [
    Variant {
        what: "one codebase for all, every worker hears of every task",
        way: Way::Claims,
        fanout: None,
        apart: false,
    },
    Variant {
        what: "a codebase for each worker: no races",
        way: Way::Claims,
        fanout: None,
        apart: true,
    },
    Variant {
        what: "one codebase for all, WORKER_SSE_FANOUT=3",
        way: Way::Claims,
        fanout: Some("3"),
        apart: false,
    },
    Variant {
        what: "one codebase for all, slots=1",
        way: Way::Slots(1),
        fanout: None,
        apart: false,
    },
];

pub(super) async fn run(asked: &Asked<'_>, report: &mut Report) -> Result<(), Failure> {
    let floors = Floors::prepare(asked.ground).await?;
    let workers = asked.sizes.workers;
    let (mut like, mut bare) = (Vec::new(), Vec::new());
    let mut lives: [Vec<Life>; VARIANTS.len()] = Default::default();
    for round in 1..=asked.rounds {
        say(&format!("{NAME}: round {round} of {}", asked.rounds));
        like.push(sum_of_floors(&floors, Table::LikeTasks, asked.seconds).await?);
        bare.push(sum_of_floors(&floors, Table::Bare, asked.seconds).await?);
        for (place, variant) in VARIANTS.iter().enumerate() {
            lives[place].extend(live(asked, *variant, workers).await?);
        }
    }
    let all = |lives: &[Life], of: fn(&Life) -> f64| lives.iter().map(of).collect::<Vec<_>>();
    let shared = all(&lives[0], |life| life.per_second);
    for (variant, lives) in VARIANTS.iter().zip(lives) {
        let what = format!("2 replicas, {workers} workers, {}", variant.what);
        if lives.is_empty() {
            report.add(Row::missing(NAME, what, "tasks/s", NOT_IN_THIS_BUILD));
            continue;
        }
        let paces = all(&lives, |life| life.per_second);
        let note = format!(
            "{:.2} claims refused for each task; of the CPU, the replicas took {:.2} cores and this load {:.2}",
            median(&all(&lives, |life| life.refused_per_task)),
            median(&all(&lives, |life| life.replicas_cores)),
            median(&all(&lives, |life| life.load_cores)),
        );
        for (floor, floors) in [("a table like tasks", &like), ("a bare table", &bare)] {
            report.add(
                Row::new(NAME, what.as_str(), "tasks/s", paces.clone())
                    .against(format!("1/(1/insert + 2/update), {floor}"), floors)
                    .note(note.as_str()),
            );
        }
        if variant.way != Way::Claims {
            report.add(
                Row::new(NAME, what, "tasks/s", paces)
                    .against("without slots, one codebase for all", &shared)
                    .target(Target::AtLeast(SLOTS_TARGET)),
            );
        }
    }
    drain::run(asked, report).await
}

/// Tasks a second if each took just an insert and two updates, one after the other.
async fn sum_of_floors(floors: &Floors<'_>, table: Table, seconds: f64) -> Result<f64, Failure> {
    let insert = floors.inserts(table, 64, seconds).await?.per_second;
    let update = floors.claims(table, 32, whole(seconds * 400.0).max(50)).await?.per_second;
    Ok(1.0 / (1.0 / insert + 2.0 / update))
}

/// What one run came to.
#[derive(Debug)]
struct Life {
    per_second: f64,
    refused_per_task: f64,
    /// Cores that the replicas and this process took; the rest of the machine is Postgres'.
    replicas_cores: f64,
    load_cores: f64,
}

/// `None`: this build knows no such variant.
async fn live(
    asked: &Asked<'_>,
    variant: Variant,
    workers: usize,
) -> Result<Option<Life>, Failure> {
    let database = asked.ground.database().await?;
    let settings: Vec<_> =
        variant.fanout.iter().map(|fanout| ("WORKER_SSE_FANOUT", *fanout)).collect();
    let servers = match replicas(asked.ground, &database, 2, &settings).await {
        Ok(servers) => servers,
        Err(NotStarted::Refused) => return Ok(None),
        Err(NotStarted::Failed(failure)) => return Err(failure),
    };
    let life = live_on(&servers, variant, workers, asked.seconds).await;
    end_all(servers).await;
    life
}

async fn live_on(
    servers: &[Server],
    variant: Variant,
    workers: usize,
    seconds: f64,
) -> Result<Option<Life>, Failure> {
    let ledger = Ledger::new(workers * IN_FLIGHT_PER_WORKER);
    let codebase =
        |worker: usize| if variant.apart { format!("bench-{worker}") } else { "bench".to_owned() };
    let mut running = JoinSet::new();
    for worker in 0..workers {
        let address = servers[worker % servers.len()].address;
        let name = format!("bench-worker-{worker}");
        let path = stream_path(&name, &codebase(worker), variant.way);
        let opened = streams::open(address, 1, |_| path.clone()).await;
        let Some(stream) = opened_or_refused(opened, variant.way)?.and_then(|mut one| one.pop())
        else {
            return Ok(None);
        };
        running.spawn(work(address, stream, name, variant.way, Arc::clone(&ledger)));
    }
    for producer in 0..PRODUCERS {
        let address = servers[producer % servers.len()].address;
        let mut codebases: Vec<_> = (0..workers).map(codebase).collect();
        // Each begins somewhere else.
        codebases.rotate_left(producer * workers / PRODUCERS);
        running.spawn(produce(address, codebases, Arc::clone(&ledger)));
    }
    let measuring = async {
        sleep(WARM_UP.min(Duration::from_secs_f64(seconds))).await;
        let count = || {
            let used = |pid| cpu_seconds(pid).unwrap_or_default();
            [
                ledger.completed.load(Ordering::Relaxed) as f64,
                ledger.refused.load(Ordering::Relaxed) as f64,
                servers.iter().map(|server| used(server.pid)).sum(),
                used(std::process::id()),
            ]
        };
        let (begun, before) = (Instant::now(), count());
        sleep(Duration::from_secs_f64(seconds)).await;
        let (elapsed, after) = (begun.elapsed().as_secs_f64(), count());
        let done = |place: usize| after[place] - before[place];
        Life {
            per_second: done(0) / elapsed,
            refused_per_task: done(1) / done(0).max(1.0),
            replicas_cores: done(2) / elapsed,
            load_cores: done(3) / elapsed,
        }
    };
    let life = tokio::select! {
        life = measuring => life,
        Some(ended) = running.join_next() => {
            ended??;
            return Err("a worker ended by itself".into());
        }
    };
    let _ = timeout(STOP_DEADLINE, running.shutdown()).await;
    Ok(Some(life))
}

/// `None`: the server serves no slots.
pub(super) fn opened_or_refused<T>(
    opened: std::io::Result<T>,
    way: Way,
) -> Result<Option<T>, Failure> {
    match opened {
        Ok(opened) => Ok(Some(opened)),
        Err(error) if way != Way::Claims && error.to_string().contains("slots_not_served") => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
