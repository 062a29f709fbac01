//! Streams that want to be looked at, each once, in the order in which they asked.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::hub::Hub;
use super::index::Index;
use super::stream::Stream;
use crate::domain::routing::is_for_all;
use crate::domain::{ConnectionId, WorkerId};

/// The queue of them; bounded by the streams there are.
#[derive(Debug, Default)]
pub(super) struct Attention {
    order: VecDeque<ConnectionId>,
    /// True: presence and routing are to be looked at, not only the backlog.
    review: HashMap<ConnectionId, bool>,
}

impl Attention {
    /// Asks for a look; a stream that waits for one keeps its place.
    pub(super) fn ask(&mut self, connection: ConnectionId, review: bool) {
        if let Some(waiting) = self.review.get_mut(&connection) {
            *waiting |= review;
        } else {
            self.review.insert(connection, review);
            self.order.push_back(connection);
        }
    }

    /// Whose turn it is, and whether for a review.
    pub(super) fn next(&mut self) -> Option<(ConnectionId, bool)> {
        while let Some(connection) = self.order.pop_front() {
            if let Some(review) = self.review.remove(&connection) {
                return Some((connection, review));
            }
        }
        None
    }

    /// A stream that is gone wants nothing.
    pub(super) fn forget(&mut self, connection: ConnectionId) {
        if self.review.remove(&connection).is_some() {
            self.order.retain(|other| *other != connection);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.review.is_empty()
    }
}

impl Hub {
    /// Has the streams of some workers looked at, presence and routing too.
    pub fn review_workers(&self, workers: &HashSet<WorkerId>) {
        self.waiters.reroute(Some(workers));
        self.pay_attention(true, |index| {
            workers.iter().filter_map(|id| index.by_worker.get(id)).flatten().copied().collect()
        });
    }

    /// Has all streams looked at, presence and routing too.
    pub fn review_all(&self) {
        self.waiters.reroute(None);
        self.pay_attention(true, |index| index.streams.keys().copied().collect());
    }

    /// Has the backlog read again of all streams, or of those of some codebases.
    pub fn refill(&self, codebases: Option<&HashSet<String>>) {
        let named = codebases.filter(|ids| !ids.iter().any(|id| is_for_all(id)));
        self.waiters.wake_all(named);
        self.pay_attention(false, |index| match named {
            Some(codebases) => codebases
                .iter()
                .filter_map(|id| index.by_codebase.get(id))
                .flat_map(HashMap::keys)
                .copied()
                .collect(),
            None => index.streams.keys().copied().collect(),
        });
    }

    /// Has the backlog of one stream read (again).
    pub fn refill_one(&self, connection: ConnectionId) {
        self.pay_attention(false, |_| vec![connection]);
    }

    fn pay_attention(&self, review: bool, to: impl FnOnce(&Index) -> Vec<ConnectionId>) {
        let mut index = self.index();
        for id in to(&index) {
            if let Some(stream) = index.streams.get(&id) {
                stream.expect_more();
                index.attention.ask(id, review);
            }
        }
        let wake = !index.attention.is_empty();
        drop(index);
        if wake {
            self.attention.notify_one();
        }
    }

    /// Up to `max` streams that want to be looked at, each with whether to review it; waits for one.
    pub async fn next_attention(&self, max: usize) -> Vec<(Arc<Stream>, bool)> {
        loop {
            let mut batch = Vec::new();
            let more = {
                let mut index = self.index();
                while batch.len() < max
                    && let Some((id, review)) = index.attention.next()
                {
                    batch.extend(index.streams.get(&id).map(|stream| (Arc::clone(stream), review)));
                }
                !index.attention.is_empty()
            };
            if more {
                self.attention.notify_one();
            }
            if !batch.is_empty() {
                return batch;
            }
            self.attention.notified().await;
        }
    }

    /// Puts streams back whose look failed.
    pub fn again(&self, streams: &[(Arc<Stream>, bool)]) {
        for (stream, review) in streams {
            self.pay_attention(*review, |_| vec![stream.connection_id]);
        }
    }
}
