//! Streams that want to be looked at, each once, in the order in which they asked.

use std::collections::{HashMap, VecDeque};

use crate::domain::ConnectionId;

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
