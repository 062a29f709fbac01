//! How many connections this process has room for, and how many of them may be streams.
//!
//! Each connection costs a file descriptor. Some are kept for Postgres and for files, and a share of
//! the rest for requests: streams never starve them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::Notify;

/// Descriptors that no connection gets: for Postgres, files and the listening socket. A quarter of a
/// small limit.
const RESERVED_MAX: usize = 256;
/// Connections, however many descriptors there are.
const CONNECTIONS_MAX: usize = 200_000;
/// Connections that no stream gets. An eighth of a few.
const REQUESTS_MAX: usize = 1_024;
/// A connection has this long to send a request's head, also each further one.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The same when room is short: who is slow on purpose holds each place for less.
const HEAD_TIMEOUT_PRESSED: Duration = Duration::from_secs(2);

/// The places there are, and those that are taken.
#[derive(Debug, Default)]
pub struct Room {
    connections: AtomicUsize,
    streams: AtomicUsize,
    left: Notify,
}

/// A connection's place; free again when dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Room>);

/// A stream's place; free again when dropped.
#[derive(Debug)]
pub(super) struct StreamPlace(Arc<Room>);

impl Room {
    /// Raises the limit of open files as far as it goes without privileges, and says what there is
    /// room for.
    pub(crate) fn open() -> Arc<Self> {
        let limit = getrlimit(Resource::Nofile);
        if limit.current != limit.maximum {
            let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
            if let Err(error) = setrlimit(Resource::Nofile, raised) {
                tracing::warn!("could not raise the limit of open files: {error}");
            }
        }
        let connections = connections_max();
        tracing::info!(
            "room for {connections} connections, {} of them streams (the limit of open files is {})",
            streams_max(connections),
            getrlimit(Resource::Nofile).current.map_or("none".to_owned(), |n| n.to_string()),
        );
        Arc::default()
    }

    /// Takes a place for a connection; `None`: there is none.
    pub(super) fn enter(self: &Arc<Self>) -> Option<Place> {
        take(&self.connections, connections_max()).then(|| Place(Arc::clone(self)))
    }

    /// Takes a place for a stream; `None`: there is none.
    pub(super) fn enter_stream(self: &Arc<Self>) -> Option<StreamPlace> {
        take(&self.streams, streams_max(connections_max())).then(|| StreamPlace(Arc::clone(self)))
    }

    /// How long a head may take now.
    pub(super) fn head_timeout(&self) -> Duration {
        let max = connections_max();
        // Streams have their own limit, which leaves so much at least to the others.
        let left = max.saturating_sub(self.connections.load(Ordering::Relaxed));
        let is_pressed = left < (max - streams_max(max)) / 2;
        if is_pressed { HEAD_TIMEOUT_PRESSED } else { HEAD_TIMEOUT }
    }

    /// Waits until every connection is gone.
    pub(super) async fn is_empty(&self) {
        loop {
            let left = self.left.notified();
            if self.connections.load(Ordering::Acquire) == 0 {
                return;
            }
            left.await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.0.connections.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.left.notify_waiters();
        }
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

fn take(taken: &AtomicUsize, max: usize) -> bool {
    let more = |now: usize| (now < max).then_some(now + 1);
    taken.try_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
}

/// Asked each time: an operator may change the limit of a running process.
fn connections_max() -> usize {
    let limit = getrlimit(Resource::Nofile).current;
    let files = limit.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    (files - (files / 4).min(RESERVED_MAX)).min(CONNECTIONS_MAX)
}

fn streams_max(connections: usize) -> usize {
    connections - (connections / 8).min(REQUESTS_MAX)
}
