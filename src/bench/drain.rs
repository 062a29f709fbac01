//! Of measurement 4: how fast one worker process gets through tasks that wait and take no time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::claims::prepare;
use super::client::{Connection, post};
use super::life::opened_or_refused;
use super::replicas::{Server, replica};
use super::report::{Report, Row, Target};
use super::streams;
use super::workers::{Held, Way, stream_path};
use super::{Asked, Failure, NOT_IN_THIS_BUILD, say};

/// Tasks that one call claims, or completes.
const CLAIMED_AT_ONCE: usize = 250;
/// Connections that claim so.
const CLAIMERS: usize = 2;
/// Connections that complete one task a call.
const COMPLETERS: usize = 64;
/// Connections that complete many a call.
const LIST_COMPLETERS: usize = 4;
/// Slots of the one stream.
const SLOTS: u32 = 512;
/// Tasks that are claimed and not completed yet.
const HELD_MAX: usize = 2_000;
/// How long a drain may take.
const DEADLINE: Duration = Duration::from_mins(3);
/// What the issue asks for.
const TARGET_PER_SECOND: f64 = 30_000.0;
const WORKER: &str = "bench-worker";
const NAME: &str = "life";

/// How one worker process gets and ends its tasks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Drain {
    /// `POST /v1/tasks/claim` for many, a call to complete each.
    Claims,
    /// The same, and completed by list.
    Lists,
    /// Pushed, a call to complete each.
    Slots,
    /// Pushed, and completed by list.
    SlotsAndLists,
}

impl Drain {
    pub(super) const ALL: [Self; 4] = [Self::Claims, Self::Lists, Self::Slots, Self::SlotsAndLists];

    pub(super) fn what(self) -> String {
        match self {
            Self::Claims => format!(
                "claim n={CLAIMED_AT_ONCE} over {CLAIMERS} connections, complete each over {COMPLETERS}"
            ),
            Self::Lists => format!(
                "claim n={CLAIMED_AT_ONCE} over {CLAIMERS}, complete lists over {LIST_COMPLETERS}"
            ),
            Self::Slots => format!("slots={SLOTS}, complete each over {COMPLETERS} connections"),
            Self::SlotsAndLists => {
                format!("slots={SLOTS}, complete lists over {LIST_COMPLETERS} connections")
            }
        }
    }

    fn has_slots(self) -> bool {
        matches!(self, Self::Slots | Self::SlotsAndLists)
    }

    fn has_lists(self) -> bool {
        matches!(self, Self::Lists | Self::SlotsAndLists)
    }
}

pub(super) async fn run(asked: &Asked<'_>, report: &mut Report) -> Result<(), Failure> {
    let tasks = asked.sizes.drained;
    let mut paces: [Vec<f64>; Drain::ALL.len()] = Default::default();
    for round in 1..=asked.rounds {
        say(&format!("{NAME}, drain: round {round} of {}", asked.rounds));
        for (place, drain) in Drain::ALL.into_iter().enumerate() {
            paces[place].extend(pace(asked, drain, tasks).await?);
        }
    }
    for (drain, pace) in Drain::ALL.into_iter().zip(paces) {
        let what = format!("drain of {tasks} tasks by one worker: {}", drain.what());
        report.add(if pace.is_empty() {
            Row::missing(NAME, what, "tasks/s", NOT_IN_THIS_BUILD)
        } else {
            Row::new(NAME, what, "tasks/s", pace)
                .absolute_target(Target::AtLeast(TARGET_PER_SECOND))
        });
    }
    Ok(())
}

/// Tasks a second. `None`: this build does not know the way.
pub(super) async fn pace(
    asked: &Asked<'_>,
    drain: Drain,
    tasks: usize,
) -> Result<Option<f64>, Failure> {
    let database = asked.ground.database().await?;
    let server = replica(asked.ground, &database, &[]).await?;
    server.register(WORKER, &["bench"]).await?;
    prepare(&database, tasks as u64).await?;
    let drained = timeout(DEADLINE, drain_all(&server, drain, tasks)).await;
    server.end().await;
    drained.map_err(|_| "the drain did not end in time")?
}

async fn drain_all(server: &Server, drain: Drain, tasks: usize) -> Result<Option<f64>, Failure> {
    if drain.has_lists() {
        let request = post("/v1/tasks/complete", r#"{"worker_id":"bench-worker","tasks":[]}"#);
        let mut connection = Connection::open(server.address).await?;
        if matches!(connection.call(&request).await?.status, 404 | 405) {
            return Ok(None);
        }
    }
    let (give, take) = mpsc::channel(HELD_MAX);
    let take = Arc::new(Mutex::new(take));
    let completed = Arc::new(AtomicUsize::new(0));
    let mut running = JoinSet::new();
    let completers = if drain.has_lists() { LIST_COMPLETERS } else { COMPLETERS };
    for _ in 0..completers {
        let connection = Connection::open(server.address).await?;
        let (take, completed) = (Arc::clone(&take), Arc::clone(&completed));
        running.spawn(async move {
            if drain.has_lists() {
                complete_lists(connection, &take, &completed).await
            } else {
                complete_each(connection, &take, &completed).await
            }
        });
    }
    let begun = Instant::now();
    if drain.has_slots() {
        let way = Way::Slots(SLOTS);
        let path = stream_path(WORKER, "bench", way);
        let opened = streams::open(server.address, 1, |_| path.clone()).await;
        let Some(mut stream) = opened_or_refused(opened, way)?.and_then(|mut one| one.pop()) else {
            return Ok(None);
        };
        running.spawn(async move {
            let (mut held, mut seen) = (Vec::new(), 0);
            while seen < tasks {
                stream.read(|event| held.extend(Held::of(event))).await?;
                for task in held.drain(..) {
                    seen += 1;
                    give.send(task).await?;
                }
            }
            drop(give);
            // The stream stays open until all is done: its end would give back what is held.
            loop {
                if stream.read(|_| {}).await.is_err() {
                    return Ok(());
                }
            }
        });
    } else {
        for _ in 0..CLAIMERS {
            running.spawn(claim_many(Connection::open(server.address).await?, give.clone()));
        }
        drop(give);
    }
    while completed.load(Ordering::Relaxed) < tasks {
        match running.join_next().await {
            Some(ended) => ended??,
            None => return Err("not every task was completed".into()),
        }
        // With slots the reader goes on: the completers end when there is no more.
    }
    Ok(Some(tasks as f64 / begun.elapsed().as_secs_f64()))
}

async fn claim_many(mut connection: Connection, give: mpsc::Sender<Held>) -> Result<(), Failure> {
    let body = format!(r#"{{"worker_id":"{WORKER}","n":{CLAIMED_AT_ONCE}}}"#);
    let request = post("/v1/tasks/claim", &body);
    loop {
        let answer = connection.call(&request).await?;
        answer.expect(200)?;
        let held = Held::all_of(answer.body);
        if held.is_empty() {
            return Ok(());
        }
        for task in held {
            give.send(task).await?;
        }
    }
}

async fn complete_each(
    mut connection: Connection,
    take: &Mutex<mpsc::Receiver<Held>>,
    completed: &AtomicUsize,
) -> Result<(), Failure> {
    let mut request = Vec::new();
    loop {
        let next = take.lock().await.recv().await;
        let Some(task) = next else { return Ok(()) };
        task.completion(&mut request, WORKER);
        connection.call(&request).await?.expect(200)?;
        completed.fetch_add(1, Ordering::Relaxed);
    }
}

async fn complete_lists(
    mut connection: Connection,
    take: &Mutex<mpsc::Receiver<Held>>,
    completed: &AtomicUsize,
) -> Result<(), Failure> {
    let mut tasks = Vec::with_capacity(CLAIMED_AT_ONCE);
    loop {
        tasks.clear();
        if take.lock().await.recv_many(&mut tasks, CLAIMED_AT_ONCE).await == 0 {
            return Ok(());
        }
        let list: Vec<_> = tasks
            .iter()
            .map(|task| format!(r#"{{"task_id":"{}","claim_epoch":{}}}"#, task.id, task.epoch))
            .collect();
        let body = format!(r#"{{"worker_id":"{WORKER}","tasks":[{}]}}"#, list.join(","));
        connection.call(&post("/v1/tasks/complete", &body)).await?.expect(200)?;
        completed.fetch_add(tasks.len(), Ordering::Relaxed);
    }
}
