//! A session of Postgres as we want it, and statements through a pooler that has no sessions.

use std::future::Future;

use futures_util::TryStreamExt;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Error, Execute, Executor, PgConnection, Postgres, SqlStr};

use super::Done;

/// What every session, or through a pooler every transaction, begins with.
///
/// - `statement_timeout`: a statement that runs longer is ended by Postgres.
/// - `lock_timeout`: so is one that waits longer for a lock, as behind an operator's transaction.
/// - `jit`: statements here are short; compiling one would take longer than running it.
/// - `max_parallel_workers_per_gather`: nor are there rows enough to share; a plan with helpers waits
///   until they have started.
/// - `plan_cache_mode`, `enable_seqscan`: every statement here reads by index for each of a few rows. Postgres is told
///   so. Otherwise it plans most of them anew each time, which takes longer than to run them, and by
///   statistics that may be of before the last million tasks: one of its plans looked through all
///   running tasks for each of 128 calls. What has to be planned for its arguments says so: [`Plans::Own`].
/// - `synchronous_commit`: what we acknowledge is on disk, whatever the server's default is. A setting
///   that promises more than `on` stays.
macro_rules! settings {
    ($set:literal, $local:literal) => {
        concat!(
            $set,
            " statement_timeout = '10s'; ",
            $set,
            " lock_timeout = '2s'; ",
            $set,
            " idle_in_transaction_session_timeout = '10s'; ",
            $set,
            " jit = off; ",
            $set,
            " max_parallel_workers_per_gather = 0; ",
            $set,
            " plan_cache_mode = force_generic_plan; ",
            $set,
            " enable_seqscan = off; ",
            "select set_config('synchronous_commit', ",
            "case current_setting('synchronous_commit') when 'off' then 'on' ",
            "else current_setting('synchronous_commit') end, ",
            $local,
            ")"
        )
    };
}

/// The settings of a session, as one text of statements.
pub(crate) const SESSION: &str = settings!("set", "false");
const BEGIN: &str = concat!("begin; ", settings!("set local", "true"));
const OWN_PLAN: &str =
    "set local plan_cache_mode = force_custom_plan; set local enable_seqscan = on";

/// How statements get to Postgres.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Carriage {
    /// A connection is a session: settings and prepared statements last.
    Direct,
    /// Through a pooler that may give each transaction to another session. So each statement is a
    /// transaction that brings its settings along, and is not prepared by name.
    Transactions,
}

/// How Postgres is to plan a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Plans {
    /// Once for all arguments, and by index.
    Shared,
    /// For its arguments: a listing whose filters are all optional.
    Own,
}

/// Without the parameters of a start that poolers refuse: settings are made afterwards.
pub(in crate::store) fn bare(options: PgConnectOptions) -> PgConnectOptions {
    // Only text format would need it.
    options.extra_float_digits(None)
}

/// A new connection, with its settings.
pub(super) async fn connect(
    options: &PgConnectOptions,
    carriage: Carriage,
) -> Result<PgConnection, Error> {
    let mut connection = options.connect().await?;
    if carriage == Carriage::Direct {
        sqlx::raw_sql(SESSION).execute(&mut connection).await?;
    }
    Ok(connection)
}

/// One statement as a transaction. Who stops waiting for it leaves a transaction open: the connection
/// must see [`end_transaction`] before it is used again.
pub(super) async fn in_transaction<'q, E: Execute<'q, Postgres> + 'q>(
    connection: &mut PgConnection,
    query: E,
    plans: Plans,
) -> Result<Vec<Done>, Error> {
    sqlx::raw_sql(BEGIN).execute(&mut *connection).await?;
    if plans == Plans::Own {
        sqlx::raw_sql(OWN_PLAN).execute(&mut *connection).await?;
    }
    let done = (&mut *connection).fetch_many(Unnamed(query)).try_collect::<Vec<_>>().await;
    if let Ok(done) = done {
        sqlx::raw_sql("commit").execute(&mut *connection).await?;
        return Ok(done);
    }
    done
}

/// Takes back whatever a statement that was left alone has begun.
pub(super) fn end_transaction(
    connection: &mut PgConnection,
) -> impl Future<Output = Result<(), Error>> + Send + '_ {
    use futures_util::TryFutureExt;
    sqlx::raw_sql("rollback").execute(connection).map_ok(|_| ())
}

/// A statement that is prepared without a name, for this one time.
struct Unnamed<E>(E);

impl<'q, E: Execute<'q, Postgres>> Execute<'q, Postgres> for Unnamed<E> {
    fn sql(self) -> SqlStr {
        self.0.sql()
    }

    fn statement(&self) -> Option<&sqlx::postgres::PgStatement> {
        None
    }

    fn take_arguments(
        &mut self,
    ) -> Result<Option<sqlx::postgres::PgArguments>, sqlx::error::BoxDynError> {
        self.0.take_arguments()
    }

    fn persistent(&self) -> bool {
        false
    }
}
