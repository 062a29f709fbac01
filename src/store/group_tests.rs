//! What a group promises, whatever its statements do.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::join_all;

use super::*;

/// How long anything may take that is expected to happen.
const PATIENCE: Duration = Duration::from_secs(20);
/// Other tasks have had their turn after so many: nothing but the clock can hold them up then.
const TURNS: usize = 100;

/// What an operation does to its statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Succeeds,
    /// No statement that it is part of has any effect.
    IsRefused,
    /// The same, and alone it waits for the gate of `locked`.
    IsLocked,
    /// Postgres is gone in the midst of the statement.
    LosesPostgres,
    Panics,
}

#[derive(Debug)]
struct Op {
    number: usize,
    deed: Deed,
    bytes: usize,
}

/// Statements under the test's control.
#[derive(Clone)]
struct Script(Arc<Shared>);

struct Shared {
    /// A permit for each statement that may end.
    gate: Semaphore,
    /// The same, for a locked operation that is tried alone.
    locked: Semaphore,
    in_flight: AtomicUsize,
    most_in_flight: AtomicUsize,
    log: std::sync::Mutex<Log>,
}

#[derive(Default)]
struct Log {
    /// What each statement was about, in the order in which they went out.
    statements: Vec<Vec<usize>>,
    /// What has taken effect, in its order.
    done: Vec<usize>,
}

impl Script {
    /// Statements that each end at once, if the gate is open.
    fn new(is_open: bool) -> Self {
        let gate = Semaphore::new(if is_open { Semaphore::MAX_PERMITS } else { 0 });
        Self(Arc::new(Shared {
            gate,
            locked: Semaphore::new(0),
            in_flight: AtomicUsize::new(0),
            most_in_flight: AtomicUsize::new(0),
            log: std::sync::Mutex::default(),
        }))
    }

    fn open(&self) {
        self.0.gate.add_permits(Semaphore::MAX_PERMITS / 2);
    }

    fn statements(&self) -> Vec<Vec<usize>> {
        self.0.log.lock().unwrap().statements.clone()
    }

    fn done(&self) -> Vec<usize> {
        self.0.log.lock().unwrap().done.clone()
    }

    /// Two statements go out and stay out: whatever comes now has to wait.
    async fn occupy(&self, group: &Arc<Group<Self>>) -> Vec<Asked> {
        let mut asked = Vec::new();
        for n in 1..=2 {
            asked.push(ask(group, 1_000_000 + n));
            until(|| self.statements().len() == n).await;
        }
        asked
    }
}

impl Batch for Script {
    type Op = Op;
    type Out = usize;

    const OPS_MAX: usize = 64;

    fn weight_bytes(op: &Op) -> usize {
        op.bytes
    }

    async fn run(&self, ops: &[Op]) -> Result<Vec<Result<usize, StoreError>>, StoreError> {
        let shared = &*self.0;
        let now = shared.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        shared.most_in_flight.fetch_max(now, Ordering::SeqCst);
        let numbers: Vec<_> = ops.iter().map(|op| op.number).collect();
        shared.log.lock().unwrap().statements.push(numbers.clone());
        let does = |deed| ops.iter().any(|op| op.deed == deed);
        assert!(!does(Deed::Panics), "as told");
        if does(Deed::IsLocked) && ops.len() == 1 {
            shared.locked.acquire().await.unwrap().forget();
        } else {
            shared.gate.acquire().await.unwrap().forget();
        }
        shared.in_flight.fetch_sub(1, Ordering::SeqCst);
        if does(Deed::LosesPostgres) {
            return Err(StoreError::timed_out());
        }
        if does(Deed::IsRefused) {
            let (constraint, message) = ("no_such".to_owned(), "as told".to_owned());
            return Err(StoreError::Refused { constraint, message });
        }
        if does(Deed::IsLocked) {
            return Err(StoreError::locked());
        }
        shared.log.lock().unwrap().done.extend(&numbers);
        Ok(numbers.into_iter().map(Ok).collect())
    }
}

type Asked = tokio::task::JoinHandle<Result<usize, StoreError>>;

fn ask(group: &Arc<Group<Script>>, number: usize) -> Asked {
    ask_for(group, number, Deed::Succeeds)
}

fn ask_for(group: &Arc<Group<Script>>, number: usize, deed: Deed) -> Asked {
    ask_heavily(group, Op { number, deed, bytes: 1 })
}

fn ask_heavily(group: &Arc<Group<Script>>, op: Op) -> Asked {
    let group = Arc::clone(group);
    tokio::spawn(async move { group.submit(op).await })
}

async fn answer(asked: Asked) -> Result<usize, StoreError> {
    tokio::time::timeout(PATIENCE, asked).await.expect("an answer").expect("no panic of the asker")
}

async fn answers(asked: Vec<Asked>) -> Vec<Result<usize, StoreError>> {
    join_all(asked.into_iter().map(answer)).await
}

async fn until(mut check: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !check() {
        assert!(begun.elapsed() < PATIENCE, "it does not happen");
        tokio::task::yield_now().await;
    }
}

/// Lets every other task go on until it waits for something.
async fn all_have_their_turn() {
    for _ in 0..TURNS {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_lone_request_goes_out_at_once_as_one_statement() {
    let script = Script::new(false);
    let group = Arc::new(Group::start(script.clone()));
    for n in 0..50 {
        let asked = ask(&group, n);
        // No clock has anything to do with it.
        all_have_their_turn().await;
        assert_eq!(script.statements().len(), n + 1, "it waits for company");
        script.0.gate.add_permits(1);
        assert_eq!(answer(asked).await.unwrap(), n);
    }
    assert!(script.statements().iter().all(|ops| ops.len() == 1));
}

#[tokio::test]
async fn a_second_request_need_not_wait_for_the_first_ones_statement() {
    let script = Script::new(false);
    let group = Arc::new(Group::start(script.clone()));
    let first = ask(&group, 1);
    all_have_their_turn().await;
    let second = ask(&group, 2);
    until(|| script.statements().len() == 2).await;
    assert_eq!(script.statements(), [[1], [2]]);
    script.open();
    assert_eq!((answer(first).await.unwrap(), answer(second).await.unwrap()), (1, 2));
}

#[tokio::test]
async fn what_arrives_while_statements_are_in_flight_shares_the_next_one_in_its_order() {
    let script = Script::new(false);
    let group = Arc::new(Group::start(script.clone()));
    let mut asked = script.occupy(&group).await;
    asked.extend((0..Script::OPS_MAX).map(|n| ask(&group, n)));
    all_have_their_turn().await;
    assert_eq!(script.statements().len(), 2, "a third statement is in flight");
    script.open();
    assert!(answers(asked).await.into_iter().all(|answer| answer.is_ok()));
    let statements = script.statements();
    assert!(statements.len() <= 4, "{statements:?}");
    let shared: Vec<_> = statements[2..].concat();
    assert_eq!(shared, (0..Script::OPS_MAX).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn at_most_two_statements_of_a_kind_are_in_flight_and_they_are_fewer_than_the_requests() {
    let script = Script::new(true);
    let group = Arc::new(Group::start(script.clone()));
    let asked = (0..5_000).map(|n| ask(&group, n)).collect();
    assert!(answers(asked).await.into_iter().all(|answer| answer.is_ok()));
    assert!(script.0.most_in_flight.load(Ordering::SeqCst) <= 2);
    assert!(script.statements().iter().all(|ops| ops.len() <= Script::OPS_MAX));
    assert!(script.statements().len() < 5_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_stand_to_their_askers() {
    let script = Script::new(true);
    let group = Arc::new(Group::start(script.clone()));
    let asked = (0..5_000).map(|n| ask(&group, n)).collect();
    for (n, answer) in answers(asked).await.into_iter().enumerate() {
        assert_eq!(answer.unwrap(), n);
    }
    let done = script.done();
    assert_eq!((done.len(), done.iter().collect::<HashSet<_>>().len()), (5_000, 5_000));
}

#[tokio::test]
async fn a_caller_that_hangs_up_cancels_nobodys_statement() {
    let script = Script::new(false);
    let group = Arc::new(Group::start(script.clone()));
    let in_flight = script.occupy(&group).await;
    let waiting: Vec<_> = (0..10).map(|n| ask(&group, n)).collect();
    all_have_their_turn().await;
    // One of those in flight, and every other one of those who wait.
    in_flight[0].abort();
    waiting.iter().step_by(2).for_each(Asked::abort);
    all_have_their_turn().await;
    script.open();
    for (n, asked) in waiting.into_iter().enumerate().filter(|(n, _)| n % 2 == 1) {
        assert_eq!(answer(asked).await.unwrap(), n);
    }
    // What was asked for is done all the same, once.
    until(|| script.done().len() == 12).await;
    let done: HashSet<_> = script.done().into_iter().collect();
    assert_eq!(done, (0..10).chain(1_000_001..=1_000_002).collect());
}

#[tokio::test]
async fn a_refused_member_fails_alone_and_its_neighbours_succeed_once() {
    let script = Script::new(false);
    let group = Arc::new(Group::start(script.clone()));
    let before = script.occupy(&group).await;
    let deed = |n| if n % 10 == 3 { Deed::IsRefused } else { Deed::Succeeds };
    let asked = (0..40).map(|n| ask_for(&group, n, deed(n))).collect();
    all_have_their_turn().await;
    script.open();
    for (n, answer) in answers(asked).await.into_iter().enumerate() {
        match answer {
            Ok(own) => assert_eq!((own, deed(n)), (n, Deed::Succeeds)),
            Err(StoreError::Refused { .. }) => assert_eq!(deed(n), Deed::IsRefused),
            Err(other) => panic!("{n}: {other:?}"),
        }
    }
    answers(before).await;
    let done = script.done();
    assert_eq!((done.len(), done.iter().collect::<HashSet<_>>().len()), (38, 38));
}

#[tokio::test]
async fn a_member_that_meets_a_locked_row_holds_up_nobody() {
    let script = Script::new(false);
    let group = Arc::new(Group::start(script.clone()));
    let before = script.occupy(&group).await;
    let mut locked = ask_for(&group, 0, Deed::IsLocked);
    let neighbours = (1..20).map(|n| ask(&group, n)).collect();
    all_have_their_turn().await;
    script.open();
    assert!(answers(neighbours).await.into_iter().all(|answer| answer.is_ok()));
    // While it waits alone, others come and go.
    for n in 20..40 {
        assert_eq!(answer(ask(&group, n)).await.unwrap(), n);
    }
    assert!((&mut locked).now_or_never().is_none(), "it is not tried alone");
    script.0.locked.add_permits(1);
    assert!(matches!(answer(locked).await, Err(StoreError::Contended(_))));
    answers(before).await;
}

#[tokio::test]
async fn what_may_have_had_its_effect_is_not_done_again() {
    let script = Script::new(false);
    let group = Arc::new(Group::start(script.clone()));
    let before = script.occupy(&group).await;
    let deed = |n| if n == 5 { Deed::LosesPostgres } else { Deed::Succeeds };
    let asked = (0..10).map(|n| ask_for(&group, n, deed(n))).collect();
    all_have_their_turn().await;
    script.open();
    for (n, answer) in answers(asked).await.into_iter().enumerate() {
        let was_shared = script.statements().iter().any(|ops| ops.contains(&n) && ops.contains(&5));
        assert_eq!(answer.is_err(), was_shared, "{n}: {answer:?}");
    }
    answers(before).await;
    let all = script.statements().concat();
    assert_eq!(all.len(), all.iter().collect::<HashSet<_>>().len(), "{all:?}");
}

#[tokio::test]
async fn who_waits_while_postgres_goes_away_is_told_at_once_or_served() {
    let script = Script::new(false);
    let group = Arc::new(Group::start(script.clone()));
    let lost = ask_for(&group, 0, Deed::LosesPostgres);
    all_have_their_turn().await;
    let other = ask(&group, 1);
    all_have_their_turn().await;
    let waiting: Vec<_> = (2..1_000).map(|n| ask(&group, n)).collect();
    all_have_their_turn().await;
    script.0.gate.add_permits(1);
    assert!(matches!(answer(lost).await, Err(StoreError::Unavailable(_))));
    script.open();
    answer(other).await.unwrap();
    for (n, answer) in (2..).zip(answers(waiting).await) {
        let is_done = script.done().contains(&n);
        assert_eq!(answer.is_ok(), is_done, "{n}: {answer:?}");
    }
    // And whoever comes later is served again.
    assert_eq!(answer(ask(&group, 7_000)).await.unwrap(), 7_000);
}

#[tokio::test]
async fn a_full_queue_is_busy_at_once_and_what_it_has_taken_is_done() {
    let script = Script::new(false);
    let group = Arc::new(Group::start(script.clone()));
    let before = script.occupy(&group).await;
    let asked: Vec<_> = (0..QUEUE_OPS_MAX + 1_000).map(|n| ask(&group, n)).collect();
    let refused = |asked: &[Asked]| asked.iter().filter(|asked| asked.is_finished()).count();
    until(|| refused(&asked) == 1_000).await;
    script.open();
    let (mut done, mut busy) = (HashSet::new(), 0);
    for answer in answers(asked).await {
        match answer {
            Ok(n) => assert!(done.insert(n)),
            Err(StoreError::Busy) => busy += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!((done.len(), busy), (QUEUE_OPS_MAX, 1_000));
    answers(before).await;
    done.extend([1_000_001, 1_000_002]);
    assert_eq!(script.done().len(), done.len());
    assert_eq!(script.done().into_iter().collect::<HashSet<_>>(), done);
    assert_eq!(answer(ask(&group, 7)).await.unwrap(), 7, "there is room again");
}

#[tokio::test]
async fn the_queue_is_bounded_in_bytes_too_whoever_asks() {
    let script = Script::new(false);
    let group = Arc::new(Group::start(script.clone()));
    let bytes = QUEUE_KIB_MAX * 1024 / 4;
    let heavy = |number| Op { number, deed: Deed::Succeeds, bytes };
    let asked: Vec<_> = (0..3).map(|n| ask_heavily(&group, heavy(n))).collect();
    all_have_their_turn().await;
    assert!(matches!(answer(ask_heavily(&group, heavy(3))).await, Err(StoreError::Busy)));
    // What is lighter still finds room, and hanging up gives none back before the end.
    let light = ask(&group, 4);
    all_have_their_turn().await;
    asked[1].abort();
    all_have_their_turn().await;
    assert!(matches!(answer(ask_heavily(&group, heavy(5))).await, Err(StoreError::Busy)));
    script.open();
    assert_eq!(answer(light).await.unwrap(), 4);
    until(|| script.done().len() == 4).await;
    assert_eq!(answer(ask_heavily(&group, heavy(6))).await.unwrap(), 6);
}

#[tokio::test]
async fn a_panic_costs_its_own_statement_and_no_other() {
    let script = Script::new(true);
    let group = Arc::new(Group::start(script.clone()));
    for n in 0..10 {
        let asked = ask_for(&group, n, Deed::Panics);
        assert!(matches!(answer(asked).await, Err(StoreError::Busy)));
        assert_eq!(answer(ask(&group, 100 + n)).await.unwrap(), 100 + n);
    }
}
