//! Measurement 3: claims by id, and who loses a race.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;

use super::client::{Connection, post, post_into};
use super::figures::Latencies;
use super::floors::{Floors, Table};
use super::ground::Database;
use super::load::{Done, closed_loop, repeat};
use super::replicas::{Server, minimal, replica};
use super::report::{Report, Row, Target};
use super::{Asked, Failure, say};

/// Connections, and what they should reach of the single-row update.
const CONNECTIONS: [(usize, Option<f64>); 3] = [(1, None), (32, Some(1.4)), (128, Some(2.0))];
/// Clients of the floor.
const FLOOR_CLIENTS: u32 = 32;
/// Claims a second that nobody reaches: so many tasks are prepared for each second.
const CLAIMS_PER_SECOND_MAX: f64 = 60_000.0;
/// The same over one connection.
const LONE_CLAIMS_PER_SECOND_MAX: f64 = 8_000.0;
/// Rows that each client of the floor claims in a second, about.
const FLOOR_ROWS_PER_SECOND: f64 = 400.0;
/// Racers for one task.
const RACERS: usize = 64;
/// What the losers' p99 may be of the winners'.
const LOSERS_TARGET: f64 = 2.0;
const NAME: &str = "claims";
/// The worker that claims.
const WORKER: &str = "bench-worker";

pub(super) async fn run(asked: &Asked<'_>, report: &mut Report) -> Result<(), Failure> {
    let floors = Floors::prepare(asked.ground).await?;
    let database = asked.ground.database().await?;
    let server = replica(asked.ground, &database, &[]).await?;
    let hello = minimal(asked.ground).await?;
    server.register(WORKER, &["bench"]).await?;
    let seconds = asked.seconds;
    let mut rounds = Rounds::default();
    for round in 1..=asked.rounds {
        say(&format!("{NAME}: round {round} of {}", asked.rounds));
        for (table, paces) in
            [(Table::LikeTasks, &mut rounds.like), (Table::Bare, &mut rounds.bare)]
        {
            let each = whole(FLOOR_ROWS_PER_SECOND * seconds).max(50);
            paces.push(floors.claims(table, FLOOR_CLIENTS, each).await?.per_second);
        }
        let each = whole(FLOOR_ROWS_PER_SECOND * seconds * 4.0).max(50);
        let lone = floors.claims(Table::LikeTasks, 1, each).await?.latency_ms;
        let length = Duration::from_secs_f64(seconds);
        let request = post("/hello", r#"{"worker_id":"bench-worker"}"#);
        let call = closed_loop(&[hello.address], 1, length, 200, |_| repeat(&request)).await?;
        rounds.lone_floor.push(lone + call.latencies.p50_ms());
        for (place, (connections, _)) in CONNECTIONS.into_iter().enumerate() {
            let done = claims(&server, &database, connections, seconds).await?;
            rounds.claims[place].push(done.per_second());
            if connections == 1 {
                rounds.lone.push(done.latencies.p50_ms());
            }
        }
        let (winners, losers) = races(&server, &database, whole(seconds * 40.0).max(20)).await?;
        rounds.winners.push(winners.p99_ms());
        rounds.losers.push(losers.p99_ms());
    }
    rounds.tell(report);
    server.end().await;
    hello.end().await;
    Ok(())
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a small number that is not negative"
)]
pub(super) fn whole(value: f64) -> u64 {
    value.ceil() as u64
}

/// Prepares so many tasks by SQL: number `k`, from 1, has the id that [`id_of`] gives.
pub(super) async fn prepare(database: &Database, count: u64) -> Result<(), Failure> {
    let sql = format!(
        "truncate tasks; \
         insert into tasks (id, title, codebase_id) \
         select lpad(k::text, 32, '0')::uuid, 'bench', 'bench' from generate_series(1, {count}) as k; \
         analyze tasks"
    );
    database.execute(&sql).await
}

/// The id of a prepared task.
pub(super) fn id_of(number: usize) -> String {
    let digits = format!("{number:032}");
    let part = |from: usize, to: usize| &digits[from..to];
    [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-")
}

/// Claims of distinct tasks, each once.
pub(super) async fn claims(
    server: &Server,
    database: &Database,
    connections: usize,
    seconds: f64,
) -> Result<Done, Failure> {
    let pace = if connections == 1 { LONE_CLAIMS_PER_SECOND_MAX } else { CLAIMS_PER_SECOND_MAX };
    let count = usize::try_from(whole(pace * seconds))?;
    prepare(database, count as u64).await?;
    claims_of(&[server], connections, seconds, 1..=count).await
}

/// Claims of the prepared tasks of these numbers.
pub(super) async fn claims_of(
    servers: &[&Server],
    connections: usize,
    seconds: f64,
    numbers: std::ops::RangeInclusive<usize>,
) -> Result<Done, Failure> {
    let (next, last) = (Arc::new(AtomicUsize::new(*numbers.start())), *numbers.end());
    let body = format!(r#"{{"worker_id":"{WORKER}"}}"#);
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    let length = Duration::from_secs_f64(seconds);
    closed_loop(&addresses, connections, length, 200, |_| {
        let (next, body) = (Arc::clone(&next), body.clone());
        move |request: &mut Vec<u8>| {
            let number = next.fetch_add(1, Ordering::Relaxed);
            post_into(request, &format!("/v1/tasks/{}/claim", id_of(number)), &body);
            number <= last
        }
    })
    .await
}

/// So many races of [`RACERS`] workers for one task each; how long the winners and the losers waited.
async fn races(
    server: &Server,
    database: &Database,
    count: u64,
) -> Result<(Latencies, Latencies), Failure> {
    prepare(database, count).await?;
    let mut racers = Vec::with_capacity(RACERS);
    for number in 0..RACERS {
        let name = format!("bench-racer-{number}");
        server.register(&name, &["bench"]).await?;
        racers.push((Connection::open(server.address).await?, name));
    }
    let (mut winners, mut losers) = (Vec::new(), Vec::new());
    for number in 1..=usize::try_from(count)? {
        let path = format!("/v1/tasks/{}/claim", id_of(number));
        let claims = racers.iter_mut().map(async |(connection, name)| {
            let request = post(&path, &format!(r#"{{"worker_id":"{name}"}}"#));
            let sent = Instant::now();
            let answer = connection.call(&request).await?;
            let has_won = answer.status == 200;
            if !has_won {
                answer.expect(409)?;
            }
            Ok::<_, std::io::Error>((has_won, sent.elapsed()))
        });
        let mut winners_now = 0;
        for (has_won, latency) in try_join_all(claims).await? {
            winners_now += usize::from(has_won);
            if has_won { &mut winners } else { &mut losers }.push(latency);
        }
        if winners_now != 1 {
            return Err(format!("{winners_now} of {RACERS} racers won a task").into());
        }
    }
    Ok((Latencies::new(winners), Latencies::new(losers)))
}

/// A figure for each round.
#[derive(Debug, Default)]
struct Rounds {
    like: Vec<f64>,
    bare: Vec<f64>,
    lone_floor: Vec<f64>,
    lone: Vec<f64>,
    claims: [Vec<f64>; CONNECTIONS.len()],
    winners: Vec<f64>,
    losers: Vec<f64>,
}

impl Rounds {
    fn tell(self, report: &mut Report) {
        for ((connections, target), claims) in CONNECTIONS.into_iter().zip(self.claims) {
            let what =
                format!("POST /v1/tasks/{{id}}/claim, {connections} connections, closed loop");
            for (floor, paces) in [("a table like tasks", &self.like), ("a bare table", &self.bare)]
            {
                let row = Row::new(NAME, what.as_str(), "claims/s", claims.clone())
                    .against(format!("update of a row of {floor}, {FLOOR_CLIENTS} clients"), paces);
                report.add(target.map_or(row.clone(), |least| row.target(Target::AtLeast(least))));
            }
        }
        report.add(Row::new(NAME, "one client's claim, p50", "ms", self.lone).against(
            "update of a row, mean, and a call of a minimal server, p50",
            &self.lone_floor,
        ));
        report.add(
            Row::new(NAME, format!("losers of a race of {RACERS}, p99"), "ms", self.losers)
                .against("winners, p99", &self.winners)
                .target(Target::AtMost(LOSERS_TARGET)),
        );
    }
}
