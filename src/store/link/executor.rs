//! Statements run on a reference to the link as they would on a pool of the driver.

use futures_util::future::{self, BoxFuture};
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt, TryFutureExt};
use sqlx::postgres::{PgRow, PgStatement, PgTypeInfo};
use sqlx::{Either, Error, Execute, Executor, Postgres, SqlStr};

use super::{Done, Link};

impl<'c> Executor<'c> for &'c Link {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Done, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let done = self.run(query).map_ok(|done| stream::iter(done.into_iter().map(Ok)));
        done.try_flatten_stream().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let done = self.run(query);
        done.map_ok(|done| done.into_iter().find_map(Either::right)).boxed()
    }

    fn prepare_with<'e>(
        self,
        _sql: SqlStr,
        _parameters: &'e [PgTypeInfo],
    ) -> BoxFuture<'e, Result<PgStatement, Error>>
    where
        'c: 'e,
    {
        // A prepared statement belongs to a connection, and nobody knows which one comes next.
        future::ready(Err(unsupported())).boxed()
    }

    fn describe<'e>(self, _sql: SqlStr) -> BoxFuture<'e, Result<sqlx::Describe<Postgres>, Error>>
    where
        'c: 'e,
    {
        future::ready(Err(unsupported())).boxed()
    }
}

fn unsupported() -> Error {
    Error::Protocol("the link only runs statements".to_owned())
}
