//! A connection in use, and what becomes of it afterwards.

use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use tokio::time::Instant;

use super::session;
use super::{Age, LIFETIME, Link, SETTLE_WAIT};

/// What is to become of a connection that is given back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Its last statement was answered to the end.
    Clean,
    /// It may be in the midst of a statement, as when a caller hung up.
    InUse,
    /// The same, in a transaction.
    InTransaction,
    /// It is of no use any more.
    Broken,
}

/// A connection in use. It goes back when dropped, at whatever moment that is.
pub(super) struct Held {
    pub(super) link: Link,
    pub(super) connection: Option<PgConnection>,
    pub(super) age: Age,
    /// When it last answered.
    pub(super) heard: Instant,
    pub(super) state: State,
}

impl Held {
    /// Whether it answers at all.
    pub(super) async fn answers(&mut self, wait: Duration) -> bool {
        let Some(connection) = self.connection.as_mut() else {
            return false;
        };
        let answer = self.link.answered(self.heard, wait, connection.ping());
        let answers = answer.await.is_ok();
        if answers {
            self.heard = Instant::now();
        }
        answers
    }

    /// Puts it by again if it answers.
    pub(super) async fn check(mut self, wait: Duration) {
        let answers = self.answers(wait).await;
        self.state = if answers { State::Clean } else { State::Broken };
    }

    /// Waits for the end of what somebody has begun on it and not waited for.
    async fn settle(mut self, is_in_transaction: bool) {
        let settled = match self.connection.as_mut() {
            Some(connection) if is_in_transaction => {
                let ended = session::end_transaction(connection);
                self.link.answered(self.heard, SETTLE_WAIT, ended).await.is_ok()
            }
            _ => self.answers(SETTLE_WAIT).await,
        };
        self.state = if settled { State::Clean } else { State::Broken };
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        let is_old = self.age.generation != self.link.0.generation.load(Ordering::Relaxed);
        if self.state == State::Broken || is_old || self.age.made.elapsed() > LIFETIME {
            // Just dropped: its socket is closed at once. A goodbye could wait for a dead link.
            drop(connection);
            self.link.0.total.fetch_sub(1, Ordering::Relaxed);
            if self.link.0.waiting.load(Ordering::Relaxed) > 0 {
                self.link.want_another();
            }
            return;
        }
        if self.state == State::Clean {
            self.link.0.put_by(connection, self.age, self.heard);
            return;
        }
        // Somebody hung up in the midst of a statement, or it failed. It counts until it has ended.
        let is_in_transaction = self.state == State::InTransaction;
        let held = Self {
            link: self.link.clone(),
            connection: Some(connection),
            age: self.age,
            heard: self.heard,
            state: State::Broken,
        };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(held.settle(is_in_transaction));
        }
    }
}
