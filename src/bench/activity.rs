//! What Postgres did in a database, from its own counters.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::ground::{Database, text};
use super::{Asked, Failure};

/// A backend tells its counters at most once a second.
const COUNTERS_LATE: Duration = Duration::from_millis(1_200);

/// What replicas do by themselves is watched for so long.
const IDLE_WATCH: Duration = Duration::from_secs(4);

/// Counters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Activity {
    pub(super) transactions: f64,
    /// Rows fetched by queries.
    pub(super) rows: f64,
    /// Of the whole server: Postgres does not tell them by database.
    pub(super) log_kib: f64,
}

/// A reading, and what replicas do by themselves, per second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quiet {
    read: Activity,
    read_at: Instant,
    per_second: Activity,
    /// How long counters may be on their way.
    late: Duration,
}

impl Activity {
    /// Once every backend has told its own.
    async fn read(database: &Database, late: Duration) -> Result<Self, Failure> {
        sleep(late).await;
        let [transactions, rows, log_kib] = counters(database).await?;
        Ok(Self { transactions, rows, log_kib })
    }

    fn minus(self, other: Self) -> Self {
        Self {
            transactions: self.transactions - other.transactions,
            rows: self.rows - other.rows,
            log_kib: self.log_kib - other.log_kib,
        }
    }

    fn times(self, factor: f64) -> Self {
        Self {
            transactions: self.transactions * factor,
            rows: self.rows * factor,
            log_kib: self.log_kib * factor,
        }
    }
}

impl Quiet {
    /// Watches what goes on when nothing does, and reads the counters.
    pub(super) async fn watch(asked: &Asked<'_>, database: &Database) -> Result<Self, Failure> {
        let late = asked.pause(COUNTERS_LATE);
        let (before, begun) = (Activity::read(database, late).await?, Instant::now());
        sleep(asked.pause(IDLE_WATCH)).await;
        let read = Activity::read(database, late).await?;
        let per_second = read.minus(before).times(1.0 / begun.elapsed().as_secs_f64());
        Ok(Self { read, read_at: Instant::now(), per_second, late })
    }

    /// What was done since; and what is done in as much time when nothing goes on.
    pub(super) async fn until_now(
        self,
        database: &Database,
    ) -> Result<(Activity, Activity), Failure> {
        let now = Activity::read(database, self.late).await?;
        let seconds = self.read_at.elapsed().as_secs_f64();
        Ok((now.minus(self.read), self.per_second.times(seconds)))
    }
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
