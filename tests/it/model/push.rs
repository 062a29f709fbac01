//! What notifications, streams and replicas do.

use super::guard::{Guard, Promise};
use super::protocol::{Protocol, Step, all};
use super::state::{
    Hold, NOBODY, Presence, Reap, Replica, State, Status, Stream, TASKS, Tell, WORKERS,
};

impl Protocol {
    pub fn apply_push(&self, state: &mut State, step: Step) {
        match step {
            Step::Hint { r, t } => {
                state.replica_mut(r).hints &= !(1 << t);
                tell_streams(state, r, t);
            }
            Step::HintTwice { r, t } => {
                state.left.repeated_hints -= 1;
                tell_streams(state, r, t);
            }
            Step::HintIsLost { r, t } => {
                state.left.lost_hints -= 1;
                let replica = state.replica_mut(r);
                replica.hints &= !(1 << t);
                if self.has(Guard::SweepFindsUnannounced) {
                    replica.unswept |= 1 << t;
                }
            }
            Step::CancelHint { r, t } => {
                state.replica_mut(r).cancel_hints &= !(1 << t);
                let task = state.task(t);
                if task.status == Status::Running
                    && state.worker(task.owner).stream == (Stream::Open { at: r })
                {
                    state.task_mut(t).cancel_told = true;
                }
            }
            Step::ListenerIsLost { r } => {
                state.left.lost_listeners -= 1;
                let replica = state.replica_mut(r);
                replica.is_listening = false;
                self.lose_hints(replica);
            }
            Step::ListenerIsBack { r } => {
                state.replica_mut(r).is_listening = true;
                if self.has(Guard::ResyncAfterListenerLoss) {
                    for worker in &mut state.workers {
                        worker.refill |= worker.stream == (Stream::Open { at: r });
                    }
                }
            }
            Step::Sweep { r } => {
                let found = std::mem::take(&mut state.replica_mut(r).unswept);
                for t in all::<TASKS>().filter(|t| found & 1 << t != 0) {
                    tell_streams(state, r, t);
                }
            }
            Step::Open { w, r } => self.open(state, w, r),
            Step::Subscribe { w } => {
                let worker = state.worker_mut(w);
                if let Stream::Opening { at, backlog } = worker.stream {
                    worker.stream = Stream::Open { at };
                    refill(state, w, backlog);
                }
            }
            Step::Refill { w } => {
                state.worker_mut(w).refill = false;
                let backlog = pending(state);
                refill(state, w, backlog);
            }
            Step::Break { w } => {
                state.left.broken_streams -= 1;
                disconnect(state, w);
            }
            Step::CleanUp { w } => {
                let worker = state.worker_mut(w);
                worker.closing = NOBODY;
                // Whatever row is not the open connection's is that of the one before it.
                if !self.has(Guard::CleanupByConnection)
                    || worker.presence.is_some_and(|presence| !presence.is_current)
                {
                    worker.presence = None;
                }
            }
            Step::ReplicaDies { r } => die(state, r),
            Step::Bury { r } => end_presence(state, r),
            Step::BuryTooEarly { r } => {
                state.left.silences -= 1;
                state.replica_mut(r).is_buried = true;
                end_presence(state, r);
            }
            Step::IsBack { r } => self.is_back(state, r),
            Step::Outage => self.outage(state),
            Step::ShowsItself { r } => state.replica_mut(r).is_seen = true,
            _ => unreachable!("{step:?} is no step of these"),
        }
    }

    fn is_back(&self, state: &mut State, r: u8) {
        state.replica_mut(r).is_buried = false;
        for worker in &mut state.workers {
            if self.has(Guard::PresenceIsRestored)
                && worker.stream.at() == Some(r)
                && worker.presence.is_none()
            {
                let process = worker.process;
                worker.presence = Some(Presence { at: r, is_current: true, process });
            }
        }
    }

    /// Postgres is away for so long that all signs of life are old when it is back.
    fn outage(&self, state: &mut State) {
        state.left.outages -= 1;
        for replica in &mut state.replicas {
            (replica.is_seen, replica.is_listening) = (false, false);
            self.lose_hints(replica);
        }
        for task in &mut state.tasks {
            task.reap = Reap::No;
        }
    }

    /// What no notification tells is left to the sweep.
    pub fn lose_hints(&self, replica: &mut Replica) {
        if self.has(Guard::SweepFindsUnannounced) {
            replica.unswept |= replica.hints;
        }
        (replica.hints, replica.cancel_hints) = (0, 0);
    }

    fn open(&self, state: &mut State, w: u8, r: u8) {
        let backlog = pending(state);
        let worker = state.worker_mut(w);
        worker.presence = Some(Presence { at: r, is_current: true, process: worker.process });
        if self.has(Guard::SubscribeBeforeBacklog) {
            worker.stream = Stream::Open { at: r };
            worker.refill = true;
        } else {
            worker.stream = Stream::Opening { at: r, backlog };
        }
    }
}

fn pending(state: &State) -> u8 {
    let is_pending = |t: &u8| state.task(*t).status == Status::Pending;
    all::<TASKS>().filter(is_pending).fold(0, |found, t| found | 1 << t)
}

fn tell(state: &mut State, w: u8, t: u8) {
    let is_pending = state.task(t).status == Status::Pending;
    let told = &mut state.worker_mut(w).tells[usize::from(t)];
    if is_pending && *told == Tell::Unknown {
        *told = Tell::Outstanding;
    }
}

fn tell_streams(state: &mut State, r: u8, t: u8) {
    for w in all::<WORKERS>() {
        if state.worker(w).stream == (Stream::Open { at: r }) {
            tell(state, w, t);
        }
    }
}

/// The backlog, and the cancellations that the worker missed.
fn refill(state: &mut State, w: u8, backlog: u8) {
    for t in all::<TASKS>() {
        if backlog & 1 << t != 0 {
            tell(state, w, t);
        }
        let task = state.task_mut(t);
        task.cancel_told |= task.status == Status::Running && task.owner == w && task.cancel;
    }
}

/// A worker's stream breaks. Its replica notices later, and cleans up.
fn disconnect(state: &mut State, w: u8) {
    let worker = state.worker_mut(w);
    let Some(at) = worker.stream.at() else { return };
    worker.stream = Stream::Closed;
    worker.refill = false;
    worker.closing = at;
    if let Some(presence) = &mut worker.presence {
        presence.is_current = false;
    }
    for t in 0..TASKS {
        if matches!(state.tasks[t].status, Status::Absent | Status::Pending | Status::Running) {
            state.worker_mut(w).tells[t] = Tell::Unknown;
        }
        let task = &mut state.tasks[t];
        if task.status == Status::Running && task.owner == w {
            task.cancel_told = false;
        }
    }
}

fn die(state: &mut State, r: u8) {
    state.left.dead_replicas -= 1;
    for w in all::<WORKERS>() {
        if state.worker(w).stream.at() == Some(r) {
            disconnect(state, w);
        }
        // The dead clean up nothing.
        if state.worker(w).closing == r {
            state.worker_mut(w).closing = NOBODY;
        }
    }
    let replica = state.replica_mut(r);
    (replica.is_alive, replica.is_buried, replica.is_listening) = (false, false, false);
    (replica.hints, replica.cancel_hints, replica.unswept) = (0, 0, 0);
    for task in &mut state.tasks {
        if matches!(task.reap, Reap::Locked(by) | Reap::Looked { by, .. } if by == r) {
            task.reap = Reap::No;
        }
        if task.status == Status::Uncommitted && task.owner == r {
            (task.status, task.owner) = (Status::Absent, NOBODY);
            state.broken = Some(Promise::AcknowledgedStays);
        }
    }
}

fn end_presence(state: &mut State, r: u8) {
    for worker in &mut state.workers {
        if worker.presence.is_some_and(|presence| presence.at == r) {
            worker.presence = None;
        }
    }
}

/// A worker's process dies and starts again under its old name: it remembers nothing.
pub fn crash(state: &mut State, w: u8, lives_on: bool) {
    state.left.crashes -= 1;
    disconnect(state, w);
    let worker = state.worker_mut(w);
    worker.process += 1;
    for t in 0..TASKS {
        if let Hold::Claim(epoch) | Hold::Beating(epoch) = worker.holds[t]
            && lives_on
        {
            worker.zombies[t] = epoch;
        }
        worker.holds[t] = Hold::Nothing;
    }
    for task in &mut state.tasks {
        if task.status == Status::Running && task.owner == w {
            task.asked = false;
        }
    }
}
