//! The streams of a replica by what is asked for.

use std::collections::HashMap;
use std::sync::Arc;

use super::attention::Attention;
use super::stream::Stream;
use crate::domain::{ConnectionId, WorkerId};

#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) streams: HashMap<ConnectionId, Arc<Stream>>,
    /// The streams themselves: who announces need not look each one up.
    pub(super) by_codebase: HashMap<String, HashMap<ConnectionId, Arc<Stream>>>,
    /// More than one only until the older one's end has come through Postgres.
    pub(super) by_worker: HashMap<WorkerId, Vec<ConnectionId>>,
    pub(super) attention: Attention,
    /// Connections that ended, and whose presence is to end.
    pub(super) departed: Vec<(WorkerId, ConnectionId)>,
}

impl Index {
    pub(super) fn add(&mut self, stream: &Arc<Stream>, codebases: &[String]) {
        for codebase in codebases {
            let streams = self.by_codebase.entry(codebase.clone()).or_default();
            streams.insert(stream.connection_id, Arc::clone(stream));
        }
    }

    pub(super) fn remove(&mut self, connection: ConnectionId, codebases: &[String]) {
        for codebase in codebases {
            if let Some(streams) = self.by_codebase.get_mut(codebase) {
                streams.remove(&connection);
                if streams.is_empty() {
                    self.by_codebase.remove(codebase);
                }
            }
        }
    }

    pub(super) fn of_worker(&self, worker: &WorkerId) -> Vec<Arc<Stream>> {
        let ids = self.by_worker.get(worker).into_iter().flatten();
        ids.filter_map(|id| self.streams.get(id).cloned()).collect()
    }
}
