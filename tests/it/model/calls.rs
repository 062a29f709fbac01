//! What the workers' calls do: claims, heartbeats, finishes, in time and late.

use super::guard::{Guard, Promise};
use super::protocol::{Protocol, Stale, Step, Verb};
use super::push::crash;
use super::state::{Hold, Late, State, Status, Tell};
use super::steps::{end, forget_hints};

/// What a claim is answered.
enum Answer {
    Won(u8),
    Refused,
}

impl Protocol {
    pub fn apply_call(&self, state: &mut State, step: Step) {
        match step {
            Step::Claim { w, t, heard } => self.claim_call(state, w, t, heard),
            Step::ClaimIsLate { w, t } => {
                state.left.late_claims -= 1;
                let (announced, process) = (announced_epoch(state, t), state.worker(w).process);
                let worker = state.worker_mut(w);
                worker.late[usize::from(t)] = Some(Late { announced, process });
                worker.holds[usize::from(t)] = Hold::Asking(announced);
            }
            Step::LateClaim { w, t } => self.late_claim(state, w, t),
            Step::ClaimMeetsLock { w, t } => {
                // Refused because of a lock whose holder changes nothing in the end.
                if !self.has(Guard::SettleOnlyDecided) {
                    settle(state, w, t);
                }
            }
            Step::ReadRepeat { w, t } => {
                let task = *state.task(t);
                if task.status != Status::Running || task.owner != w || !task.asked {
                    state.broken = Some(Promise::ClaimAnswerIsTrue);
                }
                state.worker_mut(w).holds[usize::from(t)] = Hold::Claim(task.epoch);
            }
            Step::Heartbeat { w, t } => {
                let Hold::Claim(epoch) = state.worker(w).holds[usize::from(t)] else { return };
                let hold = match self.heartbeat(state, w, t, epoch) {
                    false => Hold::Nothing,
                    true if self.has(Guard::HeartbeatHoldsRow) => Hold::Claim(epoch),
                    true => Hold::Beating(epoch),
                };
                state.worker_mut(w).holds[usize::from(t)] = hold;
            }
            Step::WriteHeartbeat { w, t } => {
                let Hold::Beating(epoch) = state.worker(w).holds[usize::from(t)] else { return };
                state.worker_mut(w).holds[usize::from(t)] = Hold::Claim(epoch);
                let task = state.task_mut(t);
                if (task.status, task.owner, task.epoch) == (Status::Running, w, epoch) {
                    task.beat = task.lapsed;
                } else {
                    state.broken = Some(Promise::HeartbeatKeepsClaim);
                }
            }
            Step::Finish { w, t, verb, heard } => {
                let Hold::Claim(epoch) = state.worker(w).holds[usize::from(t)] else { return };
                self.finish(state, w, t, Some(epoch), verb);
                if heard {
                    state.worker_mut(w).holds[usize::from(t)] = Hold::Nothing;
                } else {
                    // The worker will say it again.
                    state.left.lost_answers -= 1;
                }
                state.left.releases -= u8::from(verb == Verb::Release);
            }
            Step::OlderComplete { w, t } => {
                state.left.older_calls -= 1;
                self.finish(state, w, t, None, Verb::Complete);
                state.worker_mut(w).holds[usize::from(t)] = Hold::Nothing;
            }
            Step::Crash { w, lives_on } => crash(state, w, lives_on),
            Step::Zombie { w, t, call } => {
                let epoch = std::mem::take(&mut state.worker_mut(w).zombies[usize::from(t)]);
                match call {
                    Stale::Finish(verb) => self.finish(state, w, t, Some(epoch), verb),
                    Stale::OlderComplete => {
                        state.left.older_calls -= 1;
                        self.finish(state, w, t, None, Verb::Complete);
                    }
                    Stale::Heartbeat => {
                        self.heartbeat(state, w, t, epoch);
                    }
                }
            }
            _ => unreachable!("{step:?} is no call"),
        }
    }

    fn claim_call(&self, state: &mut State, w: u8, t: u8, heard: bool) {
        let at = usize::from(t);
        let (hold, task) = (state.worker(w).holds[at], *state.task(t));
        // The server notes that the worker acted, whether its answer arrives or not.
        settle(state, w, t);
        let is_repeat = matches!(hold, Hold::Asking(_))
            && task.status == Status::Running
            && task.owner == w
            && task.asked
            && self.has(Guard::RepeatByClaimId);
        let announced = match hold {
            Hold::Asking(announced) => announced,
            _ => announced_epoch(state, t),
        };
        let answer = if !is_repeat {
            self.claim(state, w, t, true, state.worker(w).process)
        } else if self.has(Guard::RepeatReadsOwnClaim) {
            Answer::Won(task.epoch)
        } else {
            state.worker_mut(w).holds[at] = Hold::Repeating(announced);
            return;
        };
        if !heard {
            state.left.lost_answers -= 1;
        }
        state.worker_mut(w).holds[at] = match answer {
            _ if !heard => Hold::Asking(announced),
            Answer::Won(epoch) => Hold::Claim(epoch),
            Answer::Refused => Hold::Nothing,
        };
    }

    /// The request arrives at last, and nobody waits for its answer. A repeat may have overtaken it.
    fn late_claim(&self, state: &mut State, w: u8, t: u8) {
        let at = usize::from(t);
        let Some(late) = state.worker_mut(w).late[at].take() else { return };
        let (worker, task) = (state.worker(w), state.task(t));
        let is_in_time = late.announced == task.epoch;
        if is_in_time || !self.has(Guard::LateClaimIsRefused) {
            let asked =
                late.process == worker.process && worker.holds[at] == Hold::Asking(late.announced);
            self.claim(state, w, t, asked, late.process);
        }
    }

    fn claim(&self, state: &mut State, w: u8, t: u8, asked: bool, process: u8) -> Answer {
        let task = state.task_mut(t);
        if task.status != Status::Pending && self.has(Guard::ClaimOnlyUnclaimed) {
            return Answer::Refused;
        }
        let broken = match task.status {
            Status::Running => Some(Promise::NoTakeover),
            Status::Completed | Status::Failed | Status::Cancelled => {
                Some(Promise::EndedStaysEnded)
            }
            _ if task.epoch < task.claims => Some(Promise::EpochsAreNew),
            _ => None,
        };
        (task.status, task.owner, task.process) = (Status::Running, w, process);
        task.asked = asked;
        task.epoch += 1;
        task.attempt += 1;
        task.claims += 1;
        let epoch = task.epoch;
        state.broken = broken.or(state.broken);
        forget_hints(state, t);
        Answer::Won(epoch)
    }

    /// Whether it is acknowledged. With its row held, the check and the write are one.
    fn heartbeat(&self, state: &mut State, w: u8, t: u8, epoch: u8) -> bool {
        let task = state.task_mut(t);
        let is_held = task.status == Status::Running
            && (task.owner == w || !self.has(Guard::FenceOwner))
            && (task.epoch == epoch || !self.has(Guard::FenceEpoch));
        if is_held && self.has(Guard::HeartbeatHoldsRow) {
            task.beat = task.lapsed;
        }
        is_held
    }

    fn finish(&self, state: &mut State, w: u8, t: u8, epoch: Option<u8>, verb: Verb) {
        let task = *state.task(t);
        let is_own = task.owner == w && epoch.is_none_or(|epoch| epoch == task.epoch);
        let is_held = (task.owner == w || !self.has(Guard::FenceOwner))
            && (epoch.is_none_or(|epoch| epoch == task.epoch) || !self.has(Guard::FenceEpoch));
        let is_ended = task.status > Status::Running;
        let is_open =
            task.status == Status::Running || is_ended && !self.has(Guard::FinishOnlyRunning);
        if !is_held || !is_open {
            let is_repeat = verb == Verb::Complete && is_own && task.status == Status::Completed;
            if is_repeat && !self.has(Guard::RepeatCompleteIsSuccess) {
                state.broken = Some(Promise::CompleteAnswerIsTrue);
            }
            return;
        }
        match verb {
            Verb::Complete => end(state, t, Status::Completed),
            Verb::Fail => self.end_attempt(state, t),
            Verb::Release => {
                let task = state.task_mut(t);
                if self.has(Guard::ReleaseIsFree) {
                    task.attempt -= 1;
                }
                task.releases += 1;
                if task.cancel && self.has(Guard::CancelEndsWithClaim) {
                    end(state, t, Status::Cancelled);
                } else {
                    self.reopen(state, t);
                }
            }
        }
        let row = state.task(t);
        let is_true = verb != Verb::Complete
            || row.status == Status::Completed
                && row.owner == w
                && epoch.is_none_or(|epoch| epoch == row.epoch);
        let broken = match () {
            () if is_ended => Some(Promise::EndedStaysEnded),
            () if !is_own => Some(Promise::OutcomeByOwner),
            () if !is_true => Some(Promise::CompleteAnswerIsTrue),
            () => None,
        };
        state.broken = broken.or(state.broken);
    }
}

/// The epoch that the task had when it was announced: one less if somebody has claimed it since.
fn announced_epoch(state: &State, t: u8) -> u8 {
    let task = state.task(t);
    if task.status == Status::Running { task.epoch - 1 } else { task.epoch }
}

fn settle(state: &mut State, w: u8, t: u8) {
    state.worker_mut(w).tells[usize::from(t)] = Tell::Settled;
}
