//! What can go wrong between us and Postgres, sorted by what the caller does next.

use std::fmt;
use std::sync::Arc;

/// An error of the store. Cheap to clone: one failed statement answers all who shared it.
#[derive(Clone, Debug)]
pub enum StoreError {
    /// Postgres is away, starting, read-only, out of connections, or too slow: try again later.
    Unavailable(Arc<sqlx::Error>),
    /// Postgres is there, but a row was not: locked for too long, or in a deadlock. Others are not
    /// concerned.
    Contended(Arc<sqlx::Error>),
    /// More waits for Postgres than may wait: try again later.
    Busy,
    /// A constraint refused the values. Checks in front of the store should have done it first.
    Refused {
        /// The constraint's name.
        constraint: String,
        /// Postgres' own sentence.
        message: String,
    },
    /// Anything else is a fault of ours.
    Fault(Arc<sqlx::Error>),
}

impl StoreError {
    /// Whether the same call may succeed a moment later.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Contended(_) | Self::Busy)
    }

    /// Whether Postgres is there and refused the statement: then it had no effect, and each of those who
    /// shared it may try on his own. What failed after its commit, as when its answer cannot be read, must
    /// not be done again.
    #[must_use]
    pub fn had_no_effect(&self) -> bool {
        match self {
            Self::Contended(_) | Self::Refused { .. } => true,
            Self::Fault(error) => matches!(**error, sqlx::Error::Database(_)),
            Self::Unavailable(_) | Self::Busy => false,
        }
    }

    /// Whether the statement surely had no effect, as Postgres never saw it.
    #[must_use]
    pub fn was_never_sent(&self) -> bool {
        match self {
            Self::Busy => true,
            Self::Unavailable(error) => matches!(**error, sqlx::Error::PoolTimedOut),
            _ => false,
        }
    }
}

impl StoreError {
    /// A row that the statement passed over is locked by somebody else.
    pub(super) fn locked() -> Self {
        Self::Contended(Arc::new(sqlx::Error::Protocol("the row is locked".to_owned())))
    }

    /// Postgres did not answer within a deadline of ours: the link may be half open.
    pub(super) fn timed_out() -> Self {
        let error = std::io::Error::from(std::io::ErrorKind::TimedOut);
        Self::Unavailable(Arc::new(sqlx::Error::Io(error)))
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        if let sqlx::Error::Database(database) = &error {
            let code = database.code().unwrap_or_default();
            // 23xxx: integrity; 22xxx: a value that a column's type cannot hold.
            if code.starts_with("23") || code.starts_with("22") {
                return Self::Refused {
                    constraint: database.constraint().unwrap_or_default().to_owned(),
                    message: database.message().to_owned(),
                };
            }
            return if contended(&code) {
                Self::Contended(Arc::new(error))
            } else if passes(&code) {
                Self::Unavailable(Arc::new(error))
            } else {
                Self::Fault(Arc::new(error))
            };
        }
        match error {
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed => Self::Unavailable(Arc::new(error)),
            _ => Self::Fault(Arc::new(error)),
        }
    }
}

/// `SQLSTATE`s of one statement that met another: deadlock, serialization, `lock_timeout`,
/// `statement_timeout`.
fn contended(code: &str) -> bool {
    code.starts_with("40") || matches!(code, "55P03" | "57014")
}

/// `SQLSTATE`s of a server that is not itself at the moment
/// (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).
fn passes(code: &str) -> bool {
    code.starts_with("08")            // connection
        || code.starts_with("53")     // out of connections, memory, disk
        || code.starts_with("57P")    // shutting down, crashed, starting, terminated
        || code.starts_with("28")     // role or password refused, as while roles are changed
        || code.starts_with("58")     // I/O errors of the system
        || matches!(
            code,
            "25006"                   // read-only: a standby, or a failover under way
                | "54000"             // the notification queue is full
                | "XX000"                 // an internal error of Postgres, such as a failed disk
                | "0A000"                 // a plan from before a column's type was changed
                | "26000"                 // a prepared statement that is gone
                | "25P03" | "25P04" // ended by a timeout for transactions
        )
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(_) => f.write_str("Postgres is not available"),
            Self::Contended(_) => f.write_str("a row stayed locked for too long"),
            Self::Busy => f.write_str("too much is waiting for Postgres"),
            Self::Refused { message, .. } => write!(f, "Postgres refused the values: {message}"),
            Self::Fault(_) => f.write_str("a statement failed"),
        }
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unavailable(source) | Self::Contended(source) | Self::Fault(source) => {
                Some(source.as_ref())
            }
            Self::Busy | Self::Refused { .. } => None,
        }
    }
}

/// Logs that a background duty failed; its next round makes up for it. While Postgres is away every
/// duty fails again and again: the replica's heartbeat says so once, and the rest is for debugging.
pub fn report(what: &str, error: &StoreError) {
    if error.is_passing() {
        tracing::debug!("{what}: {}", chain(error));
    } else {
        tracing::warn!("{what}: {}", chain(error));
    }
}

/// "outer: middle: inner". No `Display` prints its own source; only this does.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        // sqlx prints some of its sources itself.
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}
