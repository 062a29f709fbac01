//! Identifiers. A [`TaskId`] and a [`WorkerId`] cannot be taken for each other.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::limits::{self, Invalid};

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, sqlx::Type)]
        #[serde(transparent)]
        #[sqlx(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new id. Time-ordered, so `order by id` is also "oldest first" in ad-hoc SQL.
            #[must_use]
            pub fn generate() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

uuid_id!(
    /// One unit of work.
    TaskId
);
uuid_id!(
    /// One server process. New on every start, never reused.
    ReplicaId
);
uuid_id!(
    /// One stream of one worker. Clean-up after an older stream never matches a newer one's id.
    ConnectionId
);

/// One worker, stable across its reconnects. Chosen by the worker, or made by the server.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, sqlx::Type)]
#[serde(transparent)]
#[sqlx(transparent)]
pub struct WorkerId(String);

impl WorkerId {
    /// Checks a worker id that somebody chose.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        limits::check_id("worker_id", text)?;
        Ok(Self(text.to_owned()))
    }

    /// An id for a worker that brought none.
    #[must_use]
    pub fn generate() -> Self {
        Self(format!("worker-{}", Uuid::now_v7().simple()))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
