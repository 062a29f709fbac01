//! Whether the promises are kept in a state.

use super::guard::{Guard, Promise};
use super::protocol::{Protocol, all};
use super::state::{
    Hold, NOBODY, REPLICAS, Reap, State, Status, Stream, TASKS, Task, Tell, WORKERS,
};

impl Protocol {
    /// Whether a promise is kept in a state.
    pub fn keeps(&self, promise: Promise, state: &State) -> bool {
        if let Some(broken) = state.broken {
            return broken != promise;
        }
        match promise {
            Promise::OneLiveClaim => all::<TASKS>().all(|t| self.live_claims(state, t) <= 1),
            Promise::AttemptsAreBounded => state.tasks.iter().all(|task| {
                task.attempt <= self.max_attempts && task.attempt == task.claims - task.releases
            }),
            Promise::ClaimableIsKnown => {
                let is_lost = |t: u8| {
                    state.task(t).status == Status::Pending
                        && state.workers.iter().any(|worker| {
                            worker.stream != Stream::Closed
                                && worker.tells[usize::from(t)] != Tell::Outstanding
                        })
                };
                !all::<TASKS>().any(is_lost) || !self.is_quiet(state)
            }
            Promise::CancelReachesOwner => {
                let is_lost = |task: &Task| {
                    task.status == Status::Running
                        && task.cancel
                        && !task.cancel_told
                        && state.worker(task.owner).stream != Stream::Closed
                };
                !state.tasks.iter().any(is_lost) || !self.is_quiet(state)
            }
            Promise::NoClaimIsForgotten => {
                let is_forgotten = |t: u8| {
                    let task = state.task(t);
                    task.status == Status::Running
                        && state.worker(task.owner).holds[usize::from(t)] == Hold::Nothing
                        && self.is_vouched_for(state, task)
                };
                !all::<TASKS>().any(is_forgotten) || !self.is_quiet(state)
            }
            // Seen by the steps that would break them.
            _ => true,
        }
    }

    /// How many processes hold a claim whose writes, made with its epoch, would be accepted.
    fn live_claims(&self, state: &State, t: u8) -> usize {
        let task = state.task(t);
        if task.status != Status::Running {
            return 0;
        }
        let is_live = |w: u8, epoch: u8| {
            (task.owner == w || !self.has(Guard::FenceOwner))
                && (task.epoch == epoch || !self.has(Guard::FenceEpoch))
        };
        let at = usize::from(t);
        all::<WORKERS>()
            .map(|w| {
                let worker = state.worker(w);
                let own = matches!(worker.holds[at], Hold::Claim(epoch) if is_live(w, epoch));
                let zombie = worker.zombies[at];
                usize::from(own) + usize::from(zombie != 0 && is_live(w, zombie))
            })
            .sum()
    }

    /// Whether all that happens by itself has happened: nothing is on its way, nothing waits for a
    /// look, nobody is reaping. Such a state is reached from every other one when the faults stop,
    /// so what is promised "in the end" is promised here, as safety: `Property::eventually` would
    /// not see a state that is stuck in a cycle.
    pub fn is_quiet(&self, state: &State) -> bool {
        let is_replica_quiet = |r: u8| {
            let replica = state.replica(r);
            if !replica.is_alive {
                return !self.has(Guard::DeadReplicasAreBuried) || !has_presence(state, r);
            }
            replica.is_listening
                && replica.is_seen
                && !replica.is_buried
                && replica.hints | replica.cancel_hints | replica.unswept == 0
        };
        all::<REPLICAS>().all(is_replica_quiet)
            && state.workers.iter().all(|worker| {
                !worker.refill
                    && worker.closing == NOBODY
                    && !matches!(worker.stream, Stream::Opening { .. })
            })
            && state.tasks.iter().all(|task| task.reap == Reap::No)
    }
}

/// Whether a replica's streams are said to be open, rightly or not.
pub fn has_presence(state: &State, r: u8) -> bool {
    state.workers.iter().any(|worker| worker.presence.is_some_and(|presence| presence.at == r))
}
