//! A model check of the claim protocol: every order in which inserts, notifications, claims, lapses,
//! finishes and faults can happen to three workers, two replicas and two tasks.
//!
//! `state` is what the tables and the processes know; `steps`, `push` and `calls` are what happens,
//! `protocol` says when it can; `guard` names the promises and the rules that keep them, `promises`
//! says what they mean. Each
//! rule is left out in turn, and the promise that rests on it must break: what could be left out
//! unnoticed would be a rule that nobody understood, or a model that does not see it.
//!
//! The space is finite because each fault has a budget. Workers, replicas and tasks are alike, so
//! states that differ only in their names are one. Time is a step that makes a lease lapse; a paused
//! worker is one whose turn does not come. What is left out: routing, windows, slots, `run_at`,
//! `expires_at`, `timeout_seconds`, and how long anything takes.
//!
//! The check in CI takes seconds. The large one is run by hand, and takes minutes:
//!
//! ```text
//! cargo test --release --test it model::large -- --ignored --nocapture
//! ```

mod calls;
mod guard;
mod promises;
mod protocol;
mod push;
mod state;
mod steps;

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use self::guard::{Guard, Guards, Promise};
use self::protocol::{Example, Protocol, Step};
use self::state::{Budget, Hold, NOBODY, State, Status, Stream, Tell};

const THREADS: usize = 2;

/// One task and one lease that lapses, nothing else.
const CALM: Budget = Budget {
    inserts: 1,
    lapses: 1,
    cancels: 0,
    lost_hints: 0,
    repeated_hints: 0,
    lost_listeners: 0,
    broken_streams: 0,
    crashes: 0,
    dead_replicas: 0,
    silences: 0,
    outages: 0,
    lost_answers: 0,
    late_claims: 0,
    older_calls: 0,
    releases: 0,
};

/// Goes through all states, and says how many there are.
#[track_caller]
fn check(guards: Guards, faults: Budget, max_attempts: u8, look_for: Vec<Promise>) -> usize {
    let begun = Instant::now();
    let protocol = Protocol { guards, faults, max_attempts, look_for, examples: Vec::new() };
    let checker = protocol
        .checker()
        .threads(THREADS)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    println!(
        "{} states, {} steps, depth {}, {:.1} s: {faults:?}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64(),
    );
    if let Some((promise, path)) = checker.discoveries().into_iter().next() {
        panic!("broken: {promise}: {:?}", path.into_actions());
    }
    checker.unique_state_count()
}

/// Checks what the server promises as it is built, and all of it with the proposed guards as well.
#[track_caller]
fn check_both(faults: Budget, max_attempts: u8) -> usize {
    let mut states = check(Guards::proposed(), faults, max_attempts, Promise::all());
    // Without these faults the proposed guards have nothing to guard.
    if faults.crashes + faults.late_claims > 0 {
        let mut as_built = Promise::all();
        as_built.retain(|promise| *promise != Promise::NoClaimIsForgotten);
        states += check(Guards::as_built(), faults, max_attempts, as_built);
    }
    states
}

/// The shortest way, or nearly, to break a promise.
fn counterexample(guards: Guards, faults: Budget, promise: Promise) -> Option<Vec<Step>> {
    let protocol =
        Protocol { guards, faults, max_attempts: 2, look_for: vec![promise], examples: Vec::new() };
    let checker = protocol.checker().threads(THREADS).spawn_bfs().join();
    checker.discovery(promise.text()).map(stateright::Path::into_actions)
}

#[test]
fn no_interleaving_of_two_tasks_breaks_a_promise() {
    let two = Budget { inserts: 2, ..CALM };
    check_both(two, 1);
    check_both(Budget { lapses: 0, lost_listeners: 1, ..two }, 1);
}

#[test]
fn no_fault_breaks_a_promise() {
    let faults = [
        Budget { lapses: 2, repeated_hints: 1, releases: 1, ..CALM },
        Budget { lapses: 0, cancels: 1, lost_listeners: 1, ..CALM },
        Budget { lapses: 0, lost_hints: 1, lost_answers: 1, ..CALM },
        Budget { broken_streams: 1, older_calls: 1, ..CALM },
        Budget { crashes: 1, ..CALM },
        Budget { late_claims: 1, ..CALM },
        Budget { dead_replicas: 1, silences: 1, ..CALM },
        Budget { outages: 1, ..CALM },
    ];
    for faults in faults {
        check_both(faults, 2);
    }
}

#[test]
#[ignore = "minutes: run by hand, in release mode"]
fn large() {
    let two = Budget { inserts: 2, ..CALM };
    let faults = [
        // Several at once.
        Budget { late_claims: 1, lost_answers: 1, crashes: 1, ..CALM },
        Budget { broken_streams: 2, older_calls: 1, lapses: 2, releases: 1, ..CALM },
        Budget { dead_replicas: 1, silences: 1, broken_streams: 1, ..CALM },
        Budget { lost_listeners: 1, lost_hints: 1, broken_streams: 1, cancels: 1, ..CALM },
        // Two tasks.
        Budget { lapses: 2, ..two },
        Budget { lost_hints: 1, repeated_hints: 1, ..two },
        Budget { lost_listeners: 1, ..two },
        Budget { dead_replicas: 1, ..two },
        Budget { lost_answers: 1, ..two },
        Budget { cancels: 1, ..two },
        Budget { broken_streams: 1, ..two },
        Budget { outages: 1, ..two },
    ];
    let states: usize = faults.into_iter().map(|faults| check_both(faults, 2)).sum();
    println!("{states} states in all");
    assert!(states >= 10_000_000);
}

#[test]
fn every_guard_is_needed() {
    for guard in Guard::ALL {
        let (guards, promise) = (Guards::proposed().without(*guard), guard.breaks());
        let Some(steps) = counterexample(guards, faults_that_show(*guard), promise) else {
            panic!("without {guard:?} this is kept all the same: {}", promise.text());
        };
        println!("without {guard:?}, after {} steps, broken: {}", steps.len(), promise.text());
    }
}

/// The least that must go wrong for a guard to matter.
fn faults_that_show(guard: Guard) -> Budget {
    match guard {
        Guard::ClaimOnlyUnclaimed
        | Guard::EpochGrows
        | Guard::StreamVouches
        | Guard::SubscribeBeforeBacklog
        | Guard::ReopenedIsNews
        | Guard::SettleOnlyDecided
        | Guard::AttemptsAreCounted => CALM,
        Guard::FenceOwner => Budget { broken_streams: 1, older_calls: 1, ..CALM },
        Guard::FenceEpoch | Guard::VouchForOwnProcess => Budget { crashes: 1, ..CALM },
        Guard::FinishOnlyRunning | Guard::RepeatByClaimId | Guard::RepeatCompleteIsSuccess => {
            Budget { lost_answers: 1, ..CALM }
        }
        Guard::RepeatReadsOwnClaim => Budget { lost_answers: 1, broken_streams: 1, ..CALM },
        Guard::ReaperLooksAfterLocking
        | Guard::HeartbeatHoldsRow
        | Guard::HeartbeatCounts
        | Guard::CleanupByConnection => Budget { broken_streams: 1, ..CALM },
        Guard::PresenceIsRestored => Budget { silences: 1, ..CALM },
        Guard::JudgeOnlyWhenSteady => Budget { outages: 1, ..CALM },
        Guard::DeadReplicasAreBuried => Budget { crashes: 1, dead_replicas: 1, ..CALM },
        Guard::SweepFindsUnannounced => Budget { lost_hints: 1, ..CALM },
        Guard::ResyncAfterListenerLoss => Budget { lost_listeners: 1, cancels: 1, ..CALM },
        Guard::ReleaseIsFree => Budget { releases: 1, ..CALM },
        Guard::CancelEndsWithClaim => Budget { cancels: 1, ..CALM },
        Guard::AnswerAfterCommit => Budget { dead_replicas: 1, ..CALM },
        Guard::LateClaimIsRefused => Budget { late_claims: 1, ..CALM },
    }
}

/// A known gap, described at the two guards that would close it. Whoever closes it will see this
/// test fail, and take it out together with `Guards::as_built`.
#[test]
fn today_a_claim_that_its_worker_forgot_is_kept_alive_by_the_worker_s_stream() {
    for faults in [Budget { crashes: 1, ..CALM }, Budget { late_claims: 1, ..CALM }] {
        let steps = counterexample(Guards::as_built(), faults, Promise::NoClaimIsForgotten);
        assert!(steps.is_some());
    }
}

/// Nothing is promised by a model in which nothing happens.
#[test]
fn what_the_promises_are_about_does_happen() {
    let faults = [
        (CALM, examples_of_ends()),
        (Budget { cancels: 1, lost_hints: 1, ..CALM }, examples_of_hints()),
        (Budget { broken_streams: 1, silences: 1, ..CALM }, examples_of_streams()),
        (Budget { crashes: 1, late_claims: 1, lost_answers: 1, ..CALM }, examples_of_claims()),
        (Budget { dead_replicas: 1, ..CALM }, examples_of_replicas()),
    ];
    for (faults, examples) in faults {
        let names: Vec<_> = examples.iter().map(|(name, _)| *name).collect();
        let (guards, look_for) = (Guards::proposed(), Vec::new());
        let protocol = Protocol { guards, faults, max_attempts: 2, look_for, examples };
        let checker = protocol.checker().threads(THREADS).spawn_bfs().join();
        for name in names {
            assert!(checker.discovery(name).is_some(), "never: {name}");
        }
    }
}

fn any_task(state: &State, is: impl Fn(usize, &state::Task) -> bool) -> bool {
    state.tasks.iter().enumerate().any(|(t, task)| is(t, task))
}

fn any_worker(state: &State, is: impl Fn(&state::Worker) -> bool) -> bool {
    state.workers.iter().any(is)
}

fn examples_of_ends() -> Vec<Example> {
    vec![
        ("a task is completed", |_, state| {
            any_task(state, |_, task| task.status == Status::Completed)
        }),
        ("a task has no attempts left", |_, state| {
            any_task(state, |_, task| task.status == Status::Failed)
        }),
        ("all is quiet, and a task waits", |protocol, state| {
            protocol.is_quiet(state) && any_task(state, |_, task| task.status == Status::Pending)
        }),
        ("all is quiet, and a worker holds a task", |protocol, state| {
            protocol.is_quiet(state) && any_task(state, |_, task| task.status == Status::Running)
        }),
    ]
}

fn examples_of_hints() -> Vec<Example> {
    vec![
        ("a running task is cancelled", |_, state| {
            any_task(state, |_, task| task.status == Status::Cancelled && task.claims > 0)
        }),
        ("a cancellation comes too late", |_, state| {
            any_task(state, |_, task| task.status == Status::Completed && task.cancel)
        }),
        ("the sweep has something to find", |_, state| {
            state.replicas.iter().any(|replica| replica.unswept != 0)
        }),
    ]
}

fn examples_of_streams() -> Vec<Example> {
    vec![
        ("a new stream opens before the old one is cleaned up", |_, state| {
            any_worker(state, |worker| {
                worker.closing != NOBODY && worker.presence.is_some_and(|it| it.is_current)
            })
        }),
        ("a replica with open streams is given up", |_, state| {
            any_worker(state, |worker| worker.stream != Stream::Closed && worker.presence.is_none())
        }),
        ("only a heartbeat keeps a claim", |protocol, state| {
            any_task(state, |_, task| task.beat && !protocol.is_vouched_for(state, task))
        }),
        ("only a stream keeps a claim", |protocol, state| {
            any_task(state, |_, task| {
                task.lapsed && !task.beat && protocol.is_vouched_for(state, task)
            })
        }),
        ("a worker believes in a claim that is another's by now", |_, state| {
            any_task(state, |t, task| {
                let is_stale = |worker: &state::Worker| matches!(worker.holds[t], Hold::Claim(epoch) if epoch < task.epoch);
                task.status == Status::Running && any_worker(state, is_stale)
            })
        }),
    ]
}

fn examples_of_claims() -> Vec<Example> {
    vec![
        ("a worker owns what it does not know to own", |_, state| {
            any_task(state, |t, task| {
                task.asked && matches!(state.worker(task.owner).holds[t], Hold::Asking(_))
            })
        }),
        ("a former process and its successor hold the same task", |_, state| {
            any_task(state, |t, task| {
                let is_both = |worker: &state::Worker| {
                    worker.zombies[t] != 0 && worker.holds[t] == Hold::Claim(task.epoch)
                };
                task.status == Status::Running && any_worker(state, is_both)
            })
        }),
        ("a claim is on its way after its time", |_, state| {
            any_task(state, |t, task| {
                task.status == Status::Pending
                    && any_worker(state, |worker| {
                        worker.late[t].is_some_and(|late| late.announced < task.epoch)
                    })
            })
        }),
    ]
}

fn examples_of_replicas() -> Vec<Example> {
    vec![
        ("a dead replica vouches, until it is given up", |_, state| {
            any_worker(state, |worker| {
                worker.presence.is_some_and(|it| !state.replica(it.at).is_alive)
            })
        }),
        ("streams of both replicas know of a task", |_, state| {
            let knows = |r| {
                any_worker(state, |worker| {
                    worker.stream.at() == Some(r) && worker.tells.contains(&Tell::Outstanding)
                })
            };
            knows(0) && knows(1)
        }),
    ]
}
