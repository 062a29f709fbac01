//! What a stream is not sure of: whether its worker reads, and whether what it was told can be claimed still.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::stream::Stream;
use crate::domain::TaskId;
use crate::store::Ready;

/// A worker that holds no claim for so long is taken to read.
const RESTS_FOR: Duration = Duration::from_secs(2);
/// A call for the best may wait for 60 s, and is heard of from another replica some seconds later.
pub(super) const ASKED_LATELY: Duration = Duration::from_secs(75);

/// What a stream is not sure of any more.
#[derive(Debug)]
pub(super) struct Doubts {
    /// To be looked up.
    pub(super) check: Vec<Ready>,
    /// To be told again if it can still be claimed.
    pub(super) repeats: Vec<Ready>,
    /// More waits until the worker is proven to have read what it was told.
    pub(super) waits_for_proof: bool,
}

impl Stream {
    /// What Postgres said of its worker's claims at that time. One that holds none at two looks has read
    /// what it was told before the first of them; or if it has not, a full socket costs it no claim.
    pub(super) fn look_at_claims(&self, at: Instant, holds: bool) {
        let mut state = self.state();
        // What it was not told of yet it is not at work on.
        let holds = holds && state.slots.as_ref().is_none_or(|slots| slots.is_any_known());
        match state.rests_since {
            _ if holds => state.rests_since = None,
            None => state.rests_since = Some(at),
            Some(since) if at.saturating_duration_since(since) >= RESTS_FOR => {
                let until = at.checked_sub(RESTS_FOR).unwrap_or(since);
                state.window.prove_until(until);
                state.rest(until);
            }
            Some(_) => {}
        }
    }

    /// Whether it is known that its worker has held no claim for a while.
    pub(super) fn rests(&self, now: Instant) -> bool {
        let rests = |since| now.saturating_duration_since(since) >= RESTS_FOR;
        self.state().rests_since.is_some_and(rests)
    }

    /// Whether its worker asked for whatever is best of late, here.
    pub(super) fn has_asked_lately(&self, now: Instant) -> bool {
        self.state().asked_lately(now)
    }

    /// What is to be looked up: all of a full window while more waits, and what is to be repeated.
    pub(super) fn doubts(&self, now: Instant) -> Doubts {
        let mut state = self.state();
        let repeats = state.window.to_repeat(now);
        let is_any = state.waiting.is_any();
        let check = if is_any && !state.window.has_room() {
            state.window.outstanding().collect()
        } else {
            repeats.clone()
        };
        let waits_for_proof = state.window.waits_for_proof() || state.slots_wait_for_proof();
        if !waits_for_proof && state.ages_at.is_none_or(|at| at > now) {
            state.rests_since = None;
        }
        Doubts { check, repeats, waits_for_proof }
    }

    /// Takes what was looked up and can no longer be claimed out of the window. What this worker
    /// `won`, on whatever replica, it has read of.
    pub(super) fn clear(
        &self,
        asked: &HashSet<Ready>,
        still: &HashSet<Ready>,
        won: &HashMap<TaskId, String>,
    ) {
        let now = Instant::now();
        let mut state = self.state();
        let gone: Vec<_> = state
            .window
            .outstanding()
            .filter(|ready| asked.contains(ready) && !still.contains(ready))
            .collect();
        for ready in gone {
            // By its id, unless it is one that asks for the best. If it does that elsewhere only, it is given
            // more credit than it should have.
            let is_own = won.get(&ready.id).is_some_and(|owner| owner == self.worker_id.as_str());
            if is_own && !state.asked_lately(now) {
                state.window.prove(ready.id, now);
            }
            state.window.settle(ready.id);
        }
    }
}
