//! What Postgres did in a database, from its own counters.

use std::time::Duration;

use tokio::time::sleep;

use super::Failure;
use super::ground::{Database, text};

/// A backend tells its counters at most once a second.
const COUNTERS_LATE: Duration = Duration::from_millis(1_200);

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
pub(super) async fn activity(database: &Database) -> Result<Activity, Failure> {
    sleep(COUNTERS_LATE).await;
    let before = counters(database).await?;
    sleep(COUNTERS_LATE).await;
    let after = counters(database).await?;
    let seconds = COUNTERS_LATE.as_secs_f64();
    let [transactions, rows, log_kib] =
        std::array::from_fn(|place| (after[place] - before[place]) / seconds);
    Ok(Activity {
        transactions: after[0],
        rows: after[1],
        log_kib: after[2],
        idle: Idle { transactions, rows, log_kib },
    })
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
    /// What was done since then, without what goes on anyway.
    pub(super) fn since(self, before: Self, elapsed: Duration) -> Self {
        // The readings themselves wait, too.
        let seconds = (elapsed + COUNTERS_LATE * 2).as_secs_f64();
        let net = |now: f64, then: f64, idle: f64| (now - then - idle * seconds).max(0.0);
        let idle = before.idle;
        Self {
            transactions: net(self.transactions, before.transactions, idle.transactions),
            rows: net(self.rows, before.rows, idle.rows),
            log_kib: net(self.log_kib, before.log_kib, idle.log_kib),
            idle,
        }
    }
}
