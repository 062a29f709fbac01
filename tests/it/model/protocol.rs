//! The protocol as a model: which steps there are, and what is promised of every state.

use stateright::{Model, Property};

use super::guard::{Guard, Guards, Promise};
use super::promises::has_presence;
use super::state::{
    Budget, Hold, NOBODY, REPLICAS, Reap, State, Status, Stream, TASKS, Task, Tell, WORKERS,
};

/// The protocol with some of its guards, and the faults that it meets.
#[derive(Clone, Debug)]
pub struct Protocol {
    pub guards: Guards,
    pub faults: Budget,
    pub max_attempts: u8,
    /// Promises that may break, and what should happen at all.
    pub look_for: Vec<Promise>,
    pub examples: Vec<Example>,
}

/// Something that is to happen somewhere in the model.
pub type Example = (&'static str, fn(&Protocol, &State) -> bool);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Complete,
    Fail,
    Release,
}

/// What a former process of a worker does, late, with a claim that it believes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stale {
    Finish(Verb),
    /// In the words of the older server: without the epoch.
    OlderComplete,
    Heartbeat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    // Producers.
    Insert { t: u8, at: u8 },
    Commit { t: u8 },
    Cancel { t: u8 },
    // Notifications.
    Hint { r: u8, t: u8 },
    CancelHint { r: u8, t: u8 },
    HintIsLost { r: u8, t: u8 },
    HintTwice { r: u8, t: u8 },
    ListenerIsLost { r: u8 },
    ListenerIsBack { r: u8 },
    Sweep { r: u8 },
    // Streams and replicas.
    Open { w: u8, r: u8 },
    Subscribe { w: u8 },
    Refill { w: u8 },
    Break { w: u8 },
    CleanUp { w: u8 },
    ReplicaDies { r: u8 },
    Bury { r: u8 },
    BuryTooEarly { r: u8 },
    IsBack { r: u8 },
    Outage,
    ShowsItself { r: u8 },
    // Workers. A pause needs no step of its own: a paused worker is one whose turn does not come.
    Claim { w: u8, t: u8, heard: bool },
    ClaimIsLate { w: u8, t: u8 },
    LateClaim { w: u8, t: u8 },
    ClaimMeetsLock { w: u8, t: u8 },
    ReadRepeat { w: u8, t: u8 },
    Heartbeat { w: u8, t: u8 },
    WriteHeartbeat { w: u8, t: u8 },
    Finish { w: u8, t: u8, verb: Verb, heard: bool },
    OlderComplete { w: u8, t: u8 },
    Crash { w: u8, lives_on: bool },
    Zombie { w: u8, t: u8, call: Stale },
    // Time, and the reaper.
    LeaseLapses { t: u8 },
    HeartbeatLapses { t: u8 },
    Look { r: u8, t: u8 },
    Judge { t: u8 },
}

#[expect(clippy::cast_possible_truncation, reason = "a handful of each")]
pub fn all<const N: usize>() -> impl Iterator<Item = u8> {
    0..N as u8
}

impl Model for Protocol {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(self.faults)]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        // What follows a broken promise is of no interest.
        if state.broken.is_some() {
            return;
        }
        for t in all::<TASKS>() {
            self.task_steps(state, t, steps);
        }
        if state.left.outages > 0 {
            steps.push(Step::Outage);
        }
        for r in all::<REPLICAS>() {
            self.replica_steps(state, r, steps);
        }
        for w in all::<WORKERS>() {
            stream_steps(state, w, steps);
            for t in all::<TASKS>() {
                call_steps(state, w, t, steps);
            }
        }
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut next = last.clone();
        self.apply(&mut next, step);
        let next = next.folded();
        (next != *last).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let promises = Promise::properties().into_iter();
        let promises = promises.filter(|(promise, _)| self.look_for.contains(promise));
        let examples = self.examples.iter().map(|(name, is)| Property::sometimes(name, *is));
        promises.map(|(_, property)| property).chain(examples).collect()
    }
}

impl Protocol {
    pub fn has(&self, guard: Guard) -> bool {
        self.guards.has(guard)
    }

    fn task_steps(&self, state: &State, t: u8, steps: &mut Vec<Step>) {
        let task = state.task(t);
        match task.status {
            Status::Absent if state.left.inserts == 0 => {}
            Status::Absent if self.has(Guard::AnswerAfterCommit) => {
                steps.push(Step::Insert { t, at: NOBODY });
            }
            Status::Absent => {
                steps.extend(
                    all::<REPLICAS>()
                        .filter(|r| state.replica(*r).is_alive)
                        .map(|at| Step::Insert { t, at }),
                );
            }
            Status::Uncommitted => steps.push(Step::Commit { t }),
            Status::Pending | Status::Running => {
                if state.left.cancels > 0 && !task.cancel && !is_locked(task) {
                    steps.push(Step::Cancel { t });
                }
            }
            Status::Completed | Status::Failed | Status::Cancelled => {}
        }
        if task.status == Status::Running && !task.lapsed && state.left.lapses > 0 {
            steps.push(Step::LeaseLapses { t });
        }
        if task.beat {
            steps.push(Step::HeartbeatLapses { t });
        }
        if task.reap != Reap::No {
            steps.push(Step::Judge { t });
        } else if task.status == Status::Running && task.lapsed {
            let is_steady = state.replicas.iter().all(|other| other.is_seen || !other.is_alive);
            let reapers = all::<REPLICAS>().filter(|r| {
                let replica = state.replica(*r);
                replica.is_alive
                    && !replica.is_buried
                    && replica.is_seen
                    && (is_steady || !self.has(Guard::JudgeOnlyWhenSteady))
            });
            steps.extend(reapers.map(|r| Step::Look { r, t }));
        }
    }

    fn replica_steps(&self, state: &State, r: u8, steps: &mut Vec<Step>) {
        let (replica, left) = (state.replica(r), &state.left);
        if !replica.is_alive {
            if self.has(Guard::DeadReplicasAreBuried) && has_presence(state, r) {
                steps.push(Step::Bury { r });
            }
            return;
        }
        for t in all::<TASKS>() {
            if replica.hints & 1 << t != 0 {
                steps.push(Step::Hint { r, t });
                if left.lost_hints > 0 {
                    steps.push(Step::HintIsLost { r, t });
                }
                if left.repeated_hints > 0 {
                    steps.push(Step::HintTwice { r, t });
                }
            }
            if replica.cancel_hints & 1 << t != 0 {
                steps.push(Step::CancelHint { r, t });
            }
        }
        if !replica.is_listening {
            steps.push(Step::ListenerIsBack { r });
        } else if left.lost_listeners > 0 {
            steps.push(Step::ListenerIsLost { r });
        }
        if replica.unswept != 0 {
            steps.push(Step::Sweep { r });
        }
        if !replica.is_seen {
            steps.push(Step::ShowsItself { r });
        }
        if replica.is_buried {
            steps.push(Step::IsBack { r });
        } else if left.silences > 0 {
            steps.push(Step::BuryTooEarly { r });
        }
        if left.dead_replicas > 0 {
            steps.push(Step::ReplicaDies { r });
        }
    }
}

fn stream_steps(state: &State, w: u8, steps: &mut Vec<Step>) {
    let worker = state.worker(w);
    if worker.stream == Stream::Closed {
        let open = all::<REPLICAS>().filter(|r| {
            let replica = state.replica(*r);
            replica.is_alive && !replica.is_buried
        });
        steps.extend(open.map(|r| Step::Open { w, r }));
    } else {
        if matches!(worker.stream, Stream::Opening { .. }) {
            steps.push(Step::Subscribe { w });
        }
        if worker.refill {
            steps.push(Step::Refill { w });
        }
        if state.left.broken_streams > 0 {
            steps.push(Step::Break { w });
        }
    }
    if worker.closing != NOBODY {
        steps.push(Step::CleanUp { w });
    }
    if state.left.crashes > 0 && worker.holds != [Hold::Nothing; TASKS] {
        steps.push(Step::Crash { w, lives_on: false });
        if worker.holds.iter().any(|hold| matches!(hold, Hold::Claim(_))) {
            steps.push(Step::Crash { w, lives_on: true });
        }
    }
}

fn call_steps(state: &State, w: u8, t: u8, steps: &mut Vec<Step>) {
    let (worker, task, left) = (state.worker(w), state.task(t), &state.left);
    let at = usize::from(t);
    match worker.holds[at] {
        Hold::Nothing => {
            // A worker only claims what it was told of.
            if worker.tells[at] == Tell::Outstanding {
                steps.push(Step::Claim { w, t, heard: true });
                if left.lost_answers > 0 {
                    steps.push(Step::Claim { w, t, heard: false });
                }
                if left.late_claims > 0 {
                    steps.push(Step::ClaimIsLate { w, t });
                }
                if task.status == Status::Pending {
                    steps.push(Step::ClaimMeetsLock { w, t });
                }
            }
        }
        Hold::Asking(_) => {
            steps.push(Step::Claim { w, t, heard: true });
            if left.lost_answers > 0 {
                steps.push(Step::Claim { w, t, heard: false });
            }
        }
        Hold::Repeating(_) => steps.push(Step::ReadRepeat { w, t }),
        Hold::Beating(_) => steps.push(Step::WriteHeartbeat { w, t }),
        // A write to a row that the reaper has locked waits.
        Hold::Claim(_) if is_locked(task) => {}
        Hold::Claim(_) => {
            // One that comes before its lease is over changes nothing that the next one, which
            // comes after, does not; nor does one more.
            if task.lapsed && !task.beat || task.status != Status::Running || task.owner != w {
                steps.push(Step::Heartbeat { w, t });
            }
            for verb in [Verb::Complete, Verb::Fail, Verb::Release] {
                if verb != Verb::Release || left.releases > 0 {
                    steps.push(Step::Finish { w, t, verb, heard: true });
                }
            }
            if left.lost_answers > 0 {
                steps.push(Step::Finish { w, t, verb: Verb::Complete, heard: false });
            }
            if left.older_calls > 0 {
                steps.push(Step::OlderComplete { w, t });
            }
        }
    }
    if worker.late[at].is_some() {
        steps.push(Step::LateClaim { w, t });
    }
    if worker.zombies[at] != 0 && !is_locked(task) {
        let finishes = [Verb::Complete, Verb::Fail, Verb::Release].map(Stale::Finish);
        let older = (left.older_calls > 0).then_some(Stale::OlderComplete);
        let calls = finishes.into_iter().chain([Stale::Heartbeat]).chain(older);
        steps.extend(calls.map(|call| Step::Zombie { w, t, call }));
    }
}

/// Whether the reaper makes others wait for this row.
fn is_locked(task: &Task) -> bool {
    matches!(task.reap, Reap::Locked(_))
}
