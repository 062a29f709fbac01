//! Measurement 8: one task, and thousands of workers that all want it.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::activity::{Activity, Quiet};
use super::client::{Connection, get, post, text_after};
use super::figures::median;
use super::ground::Database;
use super::life::opened_or_refused;
use super::replicas::{NotStarted, Server, replica};
use super::report::{Report, Row};
use super::sse::Stream;
use super::streams;
use super::workers::{Held, Way, stream_path};
use super::{Asked, Failure, NOT_IN_THIS_BUILD, say};

/// Connections that are opened at the same time.
const OPENING_MAX: usize = 64;
/// Tasks of one round.
const TASKS: usize = 3;
/// How long a herd may take.
const DEADLINE: Duration = Duration::from_mins(1);
/// When nobody has said anything for so long and the task is taken, nobody else will hear of it.
const QUIET: Duration = Duration::from_secs(1);
const NAME: &str = "herd";

#[derive(Clone, Copy, Debug)]
struct Variant {
    what: &'static str,
    way: Way,
    fanout: Option<&'static str>,
}

const VARIANTS: [Variant; 3] = [
    Variant { what: "every worker hears of it", way: Way::Claims, fanout: None },
    Variant { what: "WORKER_SSE_FANOUT=3", way: Way::Claims, fanout: Some("3") },
    Variant { what: "slots=1", way: Way::Slots(1), fanout: None },
];

/// What one task came to.
#[derive(Clone, Copy, Debug)]
struct Race {
    /// From the POST sent until the winner has it, and until the last loser has its answer.
    winner_ms: f64,
    last_ms: f64,
    losers: f64,
    activity: Activity,
    /// In as much time without a task.
    idle: Activity,
}

pub(super) async fn run(asked: &Asked<'_>, report: &mut Report) -> Result<(), Failure> {
    let workers = asked.sizes.herd_workers;
    let mut races: [Vec<Race>; VARIANTS.len()] = Default::default();
    for round in 1..=asked.rounds {
        say(&format!("{NAME}: round {round} of {}", asked.rounds));
        for (place, variant) in VARIANTS.into_iter().enumerate() {
            races[place].extend(herd(asked, variant, workers).await?);
        }
    }
    for (variant, races) in VARIANTS.iter().zip(races) {
        let what = format!("one task, {workers} workers, {}", variant.what);
        if races.is_empty() {
            report.add(Row::missing(NAME, what, "ms", NOT_IN_THIS_BUILD));
            continue;
        }
        let all = |of: fn(&Race) -> f64| races.iter().map(of).collect::<Vec<_>>();
        let losers = median(&all(|race| race.losers));
        report.add(
            Row::new(NAME, format!("{what}: until the winner has it"), "ms", all(|r| r.winner_ms))
                .note(format!("{losers:.0} claims refused")),
        );
        report.add(Row::new(
            NAME,
            format!("{what}: until the last loser has its answer"),
            "ms",
            all(|race| race.last_ms),
        ));
        for (unit, of) in [
            ("transactions", (|activity| activity.transactions) as fn(&Activity) -> f64),
            ("rows fetched", |activity| activity.rows),
            ("KiB of log", |activity| activity.log_kib),
        ] {
            let done = races.iter().map(|race| of(&race.activity)).collect();
            let idle: Vec<_> = races.iter().map(|race| of(&race.idle)).collect();
            report.add(
                Row::new(NAME, format!("{what}: Postgres"), unit, done)
                    .against("in as much time without a task", &idle),
            );
        }
    }
    Ok(())
}

/// Empty: this build does not know the variant.
async fn herd(asked: &Asked<'_>, variant: Variant, workers: usize) -> Result<Vec<Race>, Failure> {
    let database = asked.ground.database().await?;
    let settings: Vec<_> =
        variant.fanout.iter().map(|fanout| ("WORKER_SSE_FANOUT", *fanout)).collect();
    let server = match replica(asked.ground, &database, &settings).await {
        Ok(server) => server,
        Err(NotStarted::Refused) => return Ok(Vec::new()),
        Err(NotStarted::Failed(failure)) => return Err(failure),
    };
    let races = herd_on(asked, &server, &database, variant, workers).await;
    server.end().await;
    races
}

async fn herd_on(
    asked: &Asked<'_>,
    server: &Server,
    database: &Database,
    variant: Variant,
    workers: usize,
) -> Result<Vec<Race>, Failure> {
    let path = |worker: usize| stream_path(&name(worker), "bench", variant.way);
    let first = streams::open(server.address, 1, path).await;
    if opened_or_refused(first, variant.way)?.is_none() {
        return Ok(Vec::new());
    }
    let mut herd = streams::open(server.address, workers, path).await?;
    let mut races = Vec::with_capacity(TASKS);
    for _ in 0..TASKS {
        let (race, back) =
            timeout(DEADLINE, one(asked, server.address, database, variant.way, herd))
                .await
                .map_err(|_| "the herd did not come to rest in time")??;
        races.push(race);
        herd = back;
    }
    Ok(races)
}

/// A connection that the server has taken: thousands at once would fill the queue before it.
async fn warm(address: SocketAddr) -> Result<Connection, io::Error> {
    let mut connection = Connection::open(address).await?;
    connection.call(&get("/healthz")).await?.expect(200)?;
    Ok(connection)
}

fn name(worker: usize) -> String {
    format!("bench-{worker}")
}

/// What a worker tells of a task.
enum Said {
    Heard,
    Won(Instant, Held),
    Lost(Instant),
}

async fn one(
    asked: &Asked<'_>,
    address: SocketAddr,
    database: &Database,
    way: Way,
    herd: Vec<Stream>,
) -> Result<(Race, Vec<Stream>), Failure> {
    let count = herd.len();
    let quiet = Quiet::watch(asked, database).await?;
    // Opened for each task: a server closes those that say nothing for long.
    let mut connections: Vec<_> = if way == Way::Claims {
        stream::iter(0..count)
            .map(|_| warm(address))
            .buffer_unordered(OPENING_MAX)
            .try_collect()
            .await?
    } else {
        Vec::new()
    };
    let (says, mut said) = mpsc::unbounded_channel();
    let (stop, stopped) = watch::channel(false);
    let mut running = JoinSet::new();
    for (worker, stream) in herd.into_iter().enumerate() {
        let (connection, says) = (connections.pop(), says.clone());
        let mut stopped = stopped.clone();
        running.spawn(async move {
            let mut stream = stream;
            let wanting = want(&mut stream, connection, worker, &says);
            tokio::select! {
                ended = wanting => ended?,
                _ = stopped.wait_for(|stop| *stop) => {}
            }
            Ok::<_, Failure>(stream)
        });
    }
    let mut producer = Connection::open(address).await?;
    let sent = Instant::now();
    let request = post("/v1/tasks", r#"{"title":"bench","codebase_id":"bench"}"#);
    let answer = producer.call(&request).await?;
    answer.expect(201)?;
    let task = text_after(answer.body, r#""id":""#).unwrap_or_default().to_owned();
    let ms = |at: Instant| at.duration_since(sent).as_secs_f64() * 1000.0;
    let (mut winner, mut last_ms, mut losers, mut waiting) = (None, 0.0_f64, 0, 0_usize);
    let mut herd = Vec::with_capacity(count);
    // To the end of the herd: all have answers, and nobody else hears of it.
    while winner.is_none() || waiting > 0 || losers + 1 < count {
        // Who failed says nothing, and would be waited for.
        while let Some(ended) = running.try_join_next() {
            herd.push(ended??);
        }
        match timeout(QUIET, said.recv()).await {
            Ok(Some(Said::Heard)) => waiting += 1,
            Ok(Some(Said::Won(at, won))) => {
                winner = Some((ms(at), won));
                waiting = waiting.saturating_sub(1);
            }
            Ok(Some(Said::Lost(at))) => {
                last_ms = last_ms.max(ms(at));
                (losers, waiting) = (losers + 1, waiting.saturating_sub(1));
            }
            Ok(None) => break,
            Err(_) if winner.is_some() && waiting == 0 => break,
            Err(_) => {}
        }
    }
    stop.send_replace(true);
    while let Some(stream) = running.join_next().await {
        herd.push(stream??);
    }
    let (winner_ms, won) = winner.ok_or("nobody got the task")?;
    let (activity, idle) = quiet.until_now(database).await?;
    if won.id != task {
        return Err("another task was handed out".into());
    }
    // By SQL: whose it is does not matter any more.
    database.execute("delete from tasks").await?;
    sleep(asked.pause(QUIET)).await;
    Ok((Race { winner_ms, last_ms, losers: losers as f64, activity, idle }, herd))
}

/// Waits for the task, and claims it at once.
async fn want(
    stream: &mut Stream,
    connection: Option<Connection>,
    worker: usize,
    says: &mpsc::UnboundedSender<Said>,
) -> Result<(), Failure> {
    let (mut heard, mut pushed) = (None, None);
    while heard.is_none() && pushed.is_none() {
        stream
            .read(|event| {
                if event.is("task_available") {
                    heard = text_after(event.data, r#""task_id":""#).map(str::to_owned);
                }
                pushed = pushed.take().or_else(|| Held::of(event));
            })
            .await
            .map_err(|error| format!("the stream of a worker: {error}"))?;
    }
    let _ = says.send(Said::Heard);
    let said = match (pushed, heard, connection) {
        (Some(held), ..) => Said::Won(Instant::now(), held),
        (None, Some(id), Some(mut connection)) => {
            let body = format!(r#"{{"worker_id":"{}"}}"#, name(worker));
            let claim = post(&format!("/v1/tasks/{id}/claim"), &body);
            let answer =
                connection.call(&claim).await.map_err(|error| format!("a claim: {error}"))?;
            if answer.status == 200 {
                Said::Won(Instant::now(), Held { id, epoch: 1 })
            } else {
                answer.expect(409)?;
                Said::Lost(Instant::now())
            }
        }
        _ => return Err("a worker with slots heard of a task that it was not given".into()),
    };
    let _ = says.send(said);
    Ok(())
}
