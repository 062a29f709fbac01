//! Measurement 2: how many tasks a second a replica takes in, each durable and announced before its answer.

use std::time::Duration;

use super::client::post;
use super::floors::{Floors, ROWS_OF_A_BATCH, Table};
use super::load::{closed_loop, repeat};
use super::replicas::{Server, minimal, replica};
use super::report::{Report, Row, Target};
use super::{Asked, Failure, say};

/// Connections of single creates, and what they should reach of the single-row floor.
const SINGLES: [(usize, Option<f64>); 3] = [(1, None), (32, Some(1.2)), (128, Some(2.0))];
/// Connections of batches.
const BATCHES: [usize; 2] = [1, 8];
/// What a batch should reach of the insert of as many rows.
const BATCH_TARGET: f64 = 0.8;
/// Clients of the floors.
const FLOOR_CLIENTS: [u32; 2] = [32, 64];
const NAME: &str = "creates";

pub(super) async fn run(asked: &Asked<'_>, report: &mut Report) -> Result<(), Failure> {
    let floors = Floors::prepare(asked.ground).await?;
    let database = asked.ground.database().await?;
    let server = replica(asked.ground, &database, &[]).await?;
    let hello = minimal(asked.ground).await?;
    let seconds = asked.seconds;
    let mut rounds = Rounds::default();
    for round in 1..=asked.rounds {
        say(&format!("{NAME}: round {round} of {}", asked.rounds));
        rounds.flush.push(floors.flushes()?.p50_ms());
        for (place, clients) in FLOOR_CLIENTS.into_iter().enumerate() {
            for (table, paces) in [
                (Table::LikeTasks, &mut rounds.like),
                (Table::Bare, &mut rounds.bare),
                (Table::Notifying, &mut rounds.notifying),
            ] {
                paces[place].push(floors.inserts(table, clients, seconds).await?.per_second);
            }
        }
        for (place, (connections, _)) in SINGLES.into_iter().enumerate() {
            rounds.singles[place].push(singles(&server, connections, seconds).await?);
        }
        for (place, connections) in BATCHES.into_iter().enumerate() {
            let clients = u32::try_from(connections)?;
            let floor = floors.batches(Table::Notifying, clients, seconds).await?;
            rounds.batch_floors[place].push(floor.per_second);
            rounds.batches[place].push(batches(&server, connections, seconds).await?);
        }
        let length = Duration::from_secs_f64(seconds);
        let call = post("/hello", BODY);
        let done = closed_loop(&[hello.address], 64, length, 200, |_| repeat(&call)).await?;
        rounds.hello.push(done.per_second());
    }
    rounds.tell(report);
    server.end().await;
    hello.end().await;
    Ok(())
}

/// A small task.
const BODY: &str = r#"{"title":"bench","codebase_id":"bench"}"#;

/// Single creates a second.
pub(super) async fn singles(
    server: &Server,
    connections: usize,
    seconds: f64,
) -> Result<f64, Failure> {
    let length = Duration::from_secs_f64(seconds);
    let call = post("/v1/tasks", BODY);
    let done = closed_loop(&[server.address], connections, length, 201, |_| repeat(&call)).await?;
    Ok(done.per_second())
}

/// Tasks a second by batches of [`ROWS_OF_A_BATCH`].
pub(super) async fn batches(
    server: &Server,
    connections: usize,
    seconds: f64,
) -> Result<f64, Failure> {
    let length = Duration::from_secs_f64(seconds);
    let tasks = vec![BODY; ROWS_OF_A_BATCH as usize].join(",");
    let body = format!("[{tasks}]");
    let call = post("/v1/tasks/batch", &body);
    let done = closed_loop(&[server.address], connections, length, 201, |_| repeat(&call)).await?;
    Ok(done.per_second() * f64::from(ROWS_OF_A_BATCH))
}

/// A figure for each round.
#[derive(Debug, Default)]
struct Rounds {
    flush: Vec<f64>,
    like: [Vec<f64>; FLOOR_CLIENTS.len()],
    bare: [Vec<f64>; FLOOR_CLIENTS.len()],
    notifying: [Vec<f64>; FLOOR_CLIENTS.len()],
    singles: [Vec<f64>; SINGLES.len()],
    batch_floors: [Vec<f64>; BATCHES.len()],
    batches: [Vec<f64>; BATCHES.len()],
    hello: Vec<f64>,
}

impl Rounds {
    fn tell(self, report: &mut Report) {
        report.add(Row::new(NAME, "fdatasync of a page, p50", "ms", self.flush));
        report.add(Row::new(NAME, "minimal axum server, 64 connections", "requests/s", self.hello));
        for ((clients, like), notifying) in
            FLOOR_CLIENTS.into_iter().zip(&self.like).zip(self.notifying)
        {
            let what = format!("insert of a row, notifying trigger, {clients} clients");
            report.add(
                Row::new(NAME, what, "rows/s", notifying)
                    .against(format!("no trigger, {clients} clients"), like),
            );
        }
        for ((connections, target), tasks) in SINGLES.into_iter().zip(self.singles) {
            // 64 clients are the floor that the targets were set by.
            let (clients, place) = if connections == 32 { (32, 0) } else { (64, 1) };
            let what = format!("POST /v1/tasks, {connections} connections, closed loop");
            for (floor, paces) in [("a table like tasks", &self.like), ("a bare table", &self.bare)]
            {
                let against = format!("insert into {floor}, {clients} clients");
                let row = Row::new(NAME, what.as_str(), "tasks/s", tasks.clone())
                    .against(against, &paces[place]);
                report.add(target.map_or(row.clone(), |least| row.target(Target::AtLeast(least))));
            }
        }
        for ((connections, tasks), floor) in
            BATCHES.into_iter().zip(self.batches).zip(self.batch_floors)
        {
            let what = format!(
                "POST /v1/tasks/batch of {ROWS_OF_A_BATCH}, {connections} connections, closed loop"
            );
            let against =
                format!("insert of {ROWS_OF_A_BATCH} rows, trigger, {connections} clients");
            report.add(
                Row::new(NAME, what, "tasks/s", tasks)
                    .against(against, &floor)
                    .target(Target::AtLeast(BATCH_TARGET)),
            );
        }
    }
}
