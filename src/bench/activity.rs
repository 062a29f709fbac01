//! What Postgres did in a database, from its own counters.

use std::time::Duration;

use tokio::time::sleep;

use super::Failure;
use super::ground::{Database, text};

/// A backend tells its counters at most once a second.
const COUNTERS_LATE: Duration = Duration::from_millis(1_200);

/// What replicas do by themselves is watched for so long.
const IDLE_WATCH: Duration = Duration::from_secs(4);

/// Counters, or the difference of two readings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Activity {
    pub(super) transactions: f64,
    /// Rows fetched by queries.
    pub(super) rows: f64,
    /// Of the whole server: Postgres does not tell them by database.
    pub(super) log_kib: f64,
    /// Per second, when nothing else went on.
    idle: Idle,
}

/// What replicas do by themselves, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Idle {
    transactions: f64,
    rows: f64,
    log_kib: f64,
}

/// Reads the counters, and what goes on when nothing does.
pub(super) async fn quiet(database: &Database) -> Result<Activity, Failure> {
    let before = settled(database).await?;
    sleep(IDLE_WATCH).await;
    let after = settled(database).await?;
    let seconds = (IDLE_WATCH + COUNTERS_LATE).as_secs_f64();
    let [transactions, rows, log_kib] =
        std::array::from_fn(|place| (after[place] - before[place]) / seconds);
    Ok(Activity::of(after, Idle { transactions, rows, log_kib }))
}

/// Reads the counters once every backend has told its own.
async fn settled(database: &Database) -> Result<[f64; 3], Failure> {
    sleep(COUNTERS_LATE).await;
    counters(database).await
}

async fn counters(database: &Database) -> Result<[f64; 3], Failure> {
    let mut connection = database.connect().await?;
    let sql = "select xact_commit || ' ' || tup_fetched || ' ' || \
                      (pg_current_wal_insert_lsn() - '0/0'::pg_lsn) \
                 from pg_stat_database where datname = current_database()";
    let line = text(&mut connection, sql).await?;
    let mut numbers = line.split(' ').map(|number| number.parse().unwrap_or(0.0));
    let mut next = || numbers.next().unwrap_or(0.0);
    Ok([next(), next(), next() / 1024.0])
}

impl Activity {
    fn of([transactions, rows, log_kib]: [f64; 3], idle: Idle) -> Self {
        Self { transactions, rows, log_kib, idle }
    }

    /// What was done since this reading, without what goes on anyway. `elapsed`: since then.
    pub(super) async fn until_now(
        self,
        database: &Database,
        elapsed: Duration,
    ) -> Result<Self, Failure> {
        let now = settled(database).await?;
        let seconds = (elapsed + COUNTERS_LATE).as_secs_f64();
        let net = |now: f64, then: f64, idle: f64| (now - then - idle * seconds).max(0.0);
        let idle = self.idle;
        let done = [
            net(now[0], self.transactions, idle.transactions),
            net(now[1], self.rows, idle.rows),
            net(now[2], self.log_kib, idle.log_kib),
        ];
        Ok(Self::of(done, idle))
    }
}
