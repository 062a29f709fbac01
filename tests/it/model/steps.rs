//! What producers, time and the reaper do.

use super::guard::{Guard, Promise};
use super::protocol::{Protocol, Step};
use super::state::{NOBODY, Reap, State, Status, Task, Tell};

impl Protocol {
    pub fn apply(&self, state: &mut State, step: Step) {
        match step {
            Step::Insert { t, at } if self.has(Guard::AnswerAfterCommit) => {
                debug_assert_eq!(at, NOBODY);
                state.left.inserts -= 1;
                state.task_mut(t).status = Status::Pending;
                self.announce(state, t);
            }
            Step::Insert { t, at } => {
                state.left.inserts -= 1;
                let task = state.task_mut(t);
                (task.status, task.owner) = (Status::Uncommitted, at);
            }
            Step::Commit { t } => {
                let task = state.task_mut(t);
                (task.status, task.owner) = (Status::Pending, NOBODY);
                self.announce(state, t);
            }
            Step::Cancel { t } => cancel(state, t),
            Step::LeaseLapses { t } => {
                state.left.lapses -= 1;
                state.task_mut(t).lapsed = true;
            }
            Step::HeartbeatLapses { t } => state.task_mut(t).beat = false,
            Step::Look { r, t } => {
                let alive = self.shows_life(state, state.task(t));
                state.task_mut(t).reap = if self.has(Guard::ReaperLooksAfterLocking) {
                    Reap::Locked(r)
                } else {
                    Reap::Looked { by: r, alive }
                };
            }
            Step::Judge { t } => self.judge(state, t),
            Step::Claim { .. }
            | Step::ClaimIsLate { .. }
            | Step::LateClaim { .. }
            | Step::ClaimMeetsLock { .. }
            | Step::ReadRepeat { .. }
            | Step::Heartbeat { .. }
            | Step::WriteHeartbeat { .. }
            | Step::Finish { .. }
            | Step::OlderComplete { .. }
            | Step::Crash { .. }
            | Step::Zombie { .. } => self.apply_call(state, step),
            _ => self.apply_push(state, step),
        }
    }

    /// A task becomes claimable: by insert, or again.
    pub fn announce(&self, state: &mut State, t: u8) {
        for replica in state.replicas.iter_mut().filter(|replica| replica.is_alive) {
            replica.hints |= 1 << t;
            if !replica.is_listening {
                self.lose_hints(replica);
            }
        }
    }

    /// A claim ends without ending the task.
    pub fn reopen(&self, state: &mut State, t: u8) {
        if state.task(t).cancel {
            state.broken = Some(Promise::CancelIsKept);
        }
        unclaim(state.task_mut(t));
        let task = state.task_mut(t);
        (task.status, task.owner) = (Status::Pending, NOBODY);
        if !self.has(Guard::EpochGrows) {
            task.epoch = 0;
        }
        if self.has(Guard::ReopenedIsNews) {
            for worker in &mut state.workers {
                worker.tells[usize::from(t)] = Tell::Unknown;
            }
        }
        self.announce(state, t);
    }

    /// Whether the presence rows say that the owner lives. Those of a dead replica count until it is
    /// given up.
    pub fn is_vouched_for(&self, state: &State, task: &Task) -> bool {
        self.has(Guard::StreamVouches)
            && state.worker(task.owner).presence.is_some_and(|presence| {
                state.replica(presence.at).is_seen
                    && (!self.has(Guard::VouchForOwnProcess) || presence.process == task.process)
            })
    }

    fn shows_life(&self, state: &State, task: &Task) -> bool {
        self.has(Guard::HeartbeatCounts) && task.beat || self.is_vouched_for(state, task)
    }

    fn judge(&self, state: &mut State, t: u8) {
        let reap = std::mem::replace(&mut state.task_mut(t).reap, Reap::No);
        let task = *state.task(t);
        let alive = match reap {
            // With the lock the row is what it was; without it, its conditions are tried again.
            Reap::Looked { alive, .. } if task.status == Status::Running && task.lapsed => alive,
            Reap::Looked { .. } | Reap::No => return,
            Reap::Locked(_) => self.shows_life(state, &task),
        };
        if alive {
            // The row's lease is moved on, as far as the heartbeat's at least.
            let task = state.task_mut(t);
            (task.lapsed, task.beat) = (false, false);
            return;
        }
        let owner = state.worker(task.owner);
        let is_open = owner.stream.at().is_some_and(|r| !state.replica(r).is_buried)
            && (!self.has(Guard::VouchForOwnProcess) || owner.process == task.process);
        let broken = match () {
            () if task.beat => Some(Promise::HeartbeatKeepsClaim),
            () if is_open => Some(Promise::StreamKeepsClaim),
            () => None,
        };
        self.end_attempt(state, t);
        state.broken = broken.or(state.broken);
    }

    /// An attempt ended without success.
    pub fn end_attempt(&self, state: &mut State, t: u8) {
        let task = state.task(t);
        if task.cancel && self.has(Guard::CancelEndsWithClaim) {
            end(state, t, Status::Cancelled);
        } else if task.attempt < self.max_attempts || !self.has(Guard::AttemptsAreCounted) {
            self.reopen(state, t);
        } else {
            end(state, t, Status::Failed);
        }
    }
}

/// A task ends. Windows drop what cannot be claimed any more.
pub fn end(state: &mut State, t: u8, status: Status) {
    let task = state.task_mut(t);
    task.status = status;
    unclaim(task);
    for worker in &mut state.workers {
        worker.tells[usize::from(t)] = Tell::Settled;
    }
    forget_hints(state, t);
}

/// What only is of interest while a claim lives.
fn unclaim(task: &mut Task) {
    (task.cancel_told, task.asked, task.process) = (false, false, 0);
    (task.lapsed, task.beat) = (false, false);
}

/// What a hint says is read again from the table: one that comes after its time changes nothing,
/// and need not be kept apart.
pub fn forget_hints(state: &mut State, t: u8) {
    for replica in &mut state.replicas {
        replica.hints &= !(1 << t);
        replica.cancel_hints &= !(1 << t);
        replica.unswept &= !(1 << t);
    }
}

fn cancel(state: &mut State, t: u8) {
    state.left.cancels -= 1;
    state.task_mut(t).cancel = true;
    if state.task(t).status == Status::Pending {
        end(state, t, Status::Cancelled);
    } else {
        for replica in &mut state.replicas {
            if replica.is_listening {
                replica.cancel_hints |= 1 << t;
            }
        }
    }
}
