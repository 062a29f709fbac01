//! Measurement 7: what becomes of the figures as replicas are added and tables grow, and beside a session
//! that holds a transaction open.

use std::time::{Duration, Instant};

use sqlx::PgConnection;
use tokio::time::sleep;

use super::claims::{claims_of, prepare, whole};
use super::client::post;
use super::figures::Latencies;
use super::ground::{Database, execute, text};
use super::load::{closed_loop, lives, repeat};
use super::replicas::{Server, end_all, replicas};
use super::report::{Report, Row, Target};
use super::{Asked, Failure, say};
use crate::store::SESSION;

/// Replicas.
const REPLICAS: [usize; 3] = [1, 2, 4];
/// Connections, over all replicas.
const CONNECTIONS: usize = 64;
/// What grown tables may cost.
const GROWN_TARGET: f64 = 0.8;
const GROWN_TIME_TARGET: f64 = 1.2;
/// What is to be left beside a session that holds a transaction open.
const HELD_TARGET: f64 = 0.95;
/// Claims that are prepared for each second, more than are made.
const CLAIMS_PER_SECOND_MAX: f64 = 60_000.0;
/// Rows that one statement makes.
const ROWS_AT_ONCE: u64 = 100_000;
/// How often the statements of the sweep are timed.
const SWEEPS: usize = 50;
const NAME: &str = "growth";

/// The statements that every replica runs again and again, with what they are given.
const SWEEP: &str = include_str!("../store/sql/push_ready_since.sql");
const DUTIES: [&str; 2] = [
    include_str!("../store/sql/maintain_promote.sql"),
    include_str!("../store/sql/maintain_expire.sql"),
];
const REAP: &str = include_str!("../store/sql/maintain_reap.sql");

/// What was measured on one database.
#[derive(Debug, Default)]
struct Figures {
    creates: [Vec<f64>; REPLICAS.len()],
    claims: [Vec<f64>; REPLICAS.len()],
    sweep: Vec<f64>,
    duties: Vec<f64>,
}

pub(super) async fn run(asked: &Asked<'_>, report: &mut Report) -> Result<(), Failure> {
    let (finished, pending) = (asked.sizes.finished, asked.sizes.pending);
    let empty = asked.ground.database_with_schema().await?;
    let grown = asked.ground.database_with_schema().await?;
    let mut unclaimed = Unclaimed { from: 1 };
    load(&grown, finished, pending).await?;
    let (mut before, mut after) = (Figures::default(), Figures::default());
    // Now that there is nothing for them to do: what is claimed below has nobody who works on it.
    for _ in 0..asked.rounds {
        for (database, figures) in [(&empty, &mut before), (&grown, &mut after)] {
            figures.sweep.push(sweep_ms(database).await?);
            figures.duties.push(duties_ms(database).await?);
        }
    }
    for round in 1..=asked.rounds {
        say(&format!("{NAME}: round {round} of {}", asked.rounds));
        for (place, count) in REPLICAS.into_iter().enumerate() {
            // The pending tasks of the large database are to do for all rounds.
            let share = pending / (asked.rounds * REPLICAS.len()) as u64;
            let each = whole(asked.seconds * CLAIMS_PER_SECOND_MAX).min(share);
            prepare(&empty, each).await?;
            let mut fresh = Unclaimed { from: 1 };
            measure(asked, &empty, place, count, &mut before, &mut fresh, each).await?;
            measure(asked, &grown, place, count, &mut after, &mut unclaimed, each).await?;
        }
    }
    let sizes = format!("{finished} finished, {pending} pending");
    for (place, count) in REPLICAS.into_iter().enumerate() {
        for (what, unit, now, then) in [
            ("creates", "tasks/s", &after.creates, &before.creates),
            ("claims", "claims/s", &after.claims, &before.claims),
        ] {
            let what = format!("{what}, {count} replicas, {CONNECTIONS} connections, {sizes}");
            report.add(
                Row::new(NAME, what, unit, now[place].clone())
                    .against("empty", &then[place])
                    .target(Target::AtLeast(GROWN_TARGET)),
            );
        }
    }
    for (what, now, then) in [
        ("the sweep's statement", after.sweep, before.sweep),
        ("statements that promote, expire and reap", after.duties, before.duties),
    ] {
        report.add(
            Row::new(NAME, format!("{what}, p50, {sizes}"), "ms", now)
                .against("empty", &then)
                .target(Target::AtMost(GROWN_TIME_TARGET)),
        );
    }
    held(asked, report).await
}

/// Which pending tasks nobody has claimed yet.
#[derive(Debug)]
struct Unclaimed {
    from: u64,
}

/// Creates and claims by so many replicas.
async fn measure(
    asked: &Asked<'_>,
    database: &Database,
    place: usize,
    count: usize,
    figures: &mut Figures,
    unclaimed: &mut Unclaimed,
    most: u64,
) -> Result<(), Failure> {
    let servers = replicas(asked.ground, database, count, &[]).await?;
    servers[0].register("bench-worker", &["bench"]).await?;
    let all: Vec<&Server> = servers.iter().collect();
    // Claims first: what is created would be in the way of nobody, but the tasks would be more.
    let last = unclaimed.from + most - 1;
    let numbers = usize::try_from(unclaimed.from)?..=usize::try_from(last)?;
    let done = claims_of(&all, CONNECTIONS, asked.seconds, numbers).await?;
    unclaimed.from = last + 1;
    figures.claims[place].push(done.per_second());
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    let length = Duration::from_secs_f64(asked.seconds);
    let create = post("/v1/tasks", r#"{"title":"bench","codebase_id":"bench-new"}"#);
    let done = closed_loop(&addresses, CONNECTIONS, length, 201, |_| repeat(&create)).await?;
    figures.creates[place].push(done.per_second());
    end_all(servers).await;
    Ok(())
}

/// Finished and pending tasks by SQL, without triggers.
async fn load(database: &Database, finished: u64, pending: u64) -> Result<(), Failure> {
    let mut connection = database.connect().await?;
    execute(
        &mut connection,
        "alter table tasks disable trigger user; set synchronous_commit = off",
    )
    .await?;
    let mut done = 0;
    while done < finished {
        let to = finished.min(done + ROWS_AT_ONCE);
        say(&format!("{NAME}: {to} of {finished} finished tasks"));
        // Over two weeks, as a table that is pruned after thirty days.
        let sql = format!(
            "with new as ( \
                 insert into tasks (title, codebase_id, status, claimed_by, claimed_at, claim_epoch, attempt, \
                                    claim_outcome, created_at, run_at, finished_at) \
                 select 'done', 'bench', 'completed', 'bench-worker', at, 1, 1, 'completed', at, at, at \
                   from (select now() - k * interval '14 days' / {finished} as at \
                           from generate_series({done} + 1, {to}) as k) as times \
                 returning id, finished_at) \
             insert into attempts (task_id, claim_epoch, attempt, worker_id, started_at, ended_at, outcome) \
             select id, 1, 1, 'bench-worker', finished_at, finished_at, 'completed' from new"
        );
        execute(&mut connection, &sql).await?;
        done = to;
    }
    let sql = format!(
        "insert into tasks (id, title, codebase_id) \
         select lpad(k::text, 32, '0')::uuid, 'bench', 'bench' from generate_series(1, {pending}) as k"
    );
    execute(&mut connection, &sql).await?;
    execute(&mut connection, "alter table tasks enable trigger user").await?;
    execute(&mut connection, "vacuum analyze tasks").await?;
    execute(&mut connection, "vacuum analyze attempts").await
}

/// A connection with the settings of a replica's.
async fn as_replica(database: &Database) -> Result<PgConnection, Failure> {
    let mut connection = database.connect().await?;
    execute(&mut connection, SESSION).await?;
    Ok(connection)
}

/// The sweep's statement as it runs when nothing is new, p50.
async fn sweep_ms(database: &Database) -> Result<f64, Failure> {
    let mut connection = as_replica(database).await?;
    let snapshot = text(&mut connection, "select pg_current_snapshot()::text").await?;
    let mut times = Vec::with_capacity(SWEEPS);
    for _ in 0..SWEEPS {
        let begun = Instant::now();
        sqlx::query(SWEEP).bind(&snapshot).bind(2_000_i64).fetch_all(&mut connection).await?;
        times.push(begun.elapsed());
    }
    Ok(Latencies::new(times).p50_ms())
}

/// The other statements that look for something to do, one after the other, p50.
async fn duties_ms(database: &Database) -> Result<f64, Failure> {
    let mut connection = as_replica(database).await?;
    // What they find is left as it is.
    execute(&mut connection, "begin").await?;
    let mut times = Vec::with_capacity(SWEEPS);
    for _ in 0..SWEEPS {
        let begun = Instant::now();
        for sql in DUTIES {
            sqlx::query(sql).bind(1_000_i64).execute(&mut connection).await?;
        }
        sqlx::query(REAP).bind(1_000_i64).bind(60.0).bind(5.0).execute(&mut connection).await?;
        times.push(begun.elapsed());
    }
    execute(&mut connection, "rollback").await?;
    Ok(Latencies::new(times).p50_ms())
}

/// Whole lives beside a session that holds a transaction id and a snapshot.
async fn held(asked: &Asked<'_>, report: &mut Report) -> Result<(), Failure> {
    let database = asked.ground.database().await?;
    let servers = replicas(asked.ground, &database, 1, &[]).await?;
    servers[0].register("bench-worker", &["bench"]).await?;
    let length = Duration::from_secs_f64(asked.seconds.max(1.0));
    let pace = async || {
        Ok::<_, Failure>(lives(servers[0].address, CONNECTIONS, length).await?.per_second())
    };
    // Once before, so that both find the same warm server.
    pace().await?;
    let undisturbed = pace().await?;
    let mut session = database.connect().await?;
    execute(&mut session, "begin isolation level repeatable read; select pg_current_xact_id()")
        .await?;
    say(&format!("{NAME}: {} s beside an open transaction", asked.sizes.held_seconds));
    let begun = Instant::now();
    let mut last = pace().await?;
    while begun.elapsed().as_secs_f64() < asked.sizes.held_seconds {
        last = pace().await?;
    }
    execute(&mut session, "rollback").await?;
    sleep(Duration::from_millis(100)).await;
    report.add(
        Row::new(
            NAME,
            format!(
                "create, claim, complete beside {:.0} s of an open transaction",
                begun.elapsed().as_secs_f64()
            ),
            "tasks/s",
            vec![last],
        )
        .against("before it", &[undisturbed])
        .target(Target::AtLeast(HELD_TARGET))
        .note(format!(
            "{CONNECTIONS} connections, closed loop, busy all the while; the last of it counts"
        )),
    );
    end_all(servers).await;
    Ok(())
}
