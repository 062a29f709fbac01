//! P1: if we said yes, your task is never lost, and it is finished once.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Campaign;
use super::caller::{Caller, http};
use super::faults::{FAULTS, World, schedule};
use super::fleet::Fleet;
use super::ledger::Ledger;
use super::producers::produce;
use super::workers::{Control, Worker};
use serde_json::json;

use crate::support::sse::Event;
use crate::support::{Replica, TestDb, http_client};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p1_every_acknowledged_task_is_finished_exactly_once_whatever_breaks() {
    let campaign = Campaign::new("p1_every_acknowledged_task");
    let tasks = campaign.number("TASKS", 2_000);
    let faults = campaign.number("FAULTS", 24);
    let gap = Duration::from_millis(campaign.number("GAP_MS", 450) as u64);
    let workers = campaign.number("WORKERS", 24);
    let lease = campaign.number("LEASE", 2);
    let replicas = campaign.number("REPLICAS", 3);
    let lease_flag = lease.to_string();
    let flags = ["--lease-seconds", &lease_flag, "--worker-sse-timeout", "30"];
    let fleet = Fleet::start(&campaign, replicas, &flags).await;
    let (ledger, http) = (Arc::new(Ledger::default()), http());

    let planned = schedule(&campaign, &FAULTS, faults, gap);
    let during: Duration = planned.iter().map(|(_, gap)| *gap).sum();
    let mut producing = JoinSet::new();
    let producers = campaign.number("PRODUCERS", 4);
    for n in 0..producers {
        let caller = Caller::new(&fleet, &http, campaign.rng("producer", n));
        let count = tasks / producers + usize::from(n < tasks % producers);
        producing.spawn(produce(caller, format!("p{n}"), Arc::clone(&ledger), count, during));
    }
    let mut working = JoinSet::new();
    let mut controls = Vec::new();
    // Streams have no time limit.
    let streams = http_client().build().unwrap();
    for n in 0..workers {
        let control = Arc::new(Control::default());
        controls.push(Arc::clone(&control));
        let caller = Caller::new(&fleet, &http, campaign.rng("worker", n));
        let (ledger, streams) = (Arc::clone(&ledger), streams.clone());
        working.spawn(Worker { n, has_stream: n % 5 != 4, caller, ledger, control, streams }.run());
    }

    let world = Arc::new(World {
        fleet: Arc::clone(&fleet),
        workers: controls,
        lease: Duration::from_secs(lease as u64),
        more: None,
        refused: AtomicUsize::new(0),
    });
    let mut striking = JoinSet::new();
    let begun = Instant::now();
    let kinds: HashSet<_> = planned.iter().map(|(fault, _)| format!("{fault:?}")).collect();
    for (n, (fault, gap)) in planned.into_iter().enumerate() {
        // The plan's times are the point: two or three faults may meet.
        sleep(gap).await;
        let (world, mut rng) = (Arc::clone(&world), campaign.rng("fault", n));
        striking.spawn(async move {
            let from = begun.elapsed().as_secs_f64();
            fault.strike(&world, &mut rng).await;
            eprintln!("{from:7.2} s to {:7.2} s: {fault:?}", begun.elapsed().as_secs_f64());
        });
    }
    join(striking).await;
    let faults_done = begun.elapsed();
    join(producing).await;
    finished(&fleet, ledger.created_count()).await;
    let all_done = begun.elapsed();

    world.workers.iter().for_each(|worker| worker.close());
    join(working).await;
    fleet.expect_sound().await;
    let figures = ledger.prove(&fleet.db).await;
    let deadlocks = "select deadlocks from pg_stat_database where datname = current_database()";
    campaign.figures(&format!(
        "{faults} faults of {} kinds within {:.0} s, everything finished {:.1} s later; {figures}; {}; \
         {workers} workers, {replicas} replicas, {} deadlocks, {} statements of the operator refused",
        kinds.len(),
        faults_done.as_secs_f64(),
        all_done.saturating_sub(faults_done).as_secs_f64(),
        fleet.tally.counts(),
        fleet.db.value(deadlocks).await,
        world.refused.load(Ordering::Relaxed),
    ));
}

/// Waits for all, and fails as the first that failed.
pub async fn join(mut tasks: JoinSet<()>) {
    while let Some(done) = timeout(Duration::from_mins(10), tasks.join_next()).await.unwrap() {
        if let Err(error) = done {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

/// Waits until nothing is pending or running. Progress is the condition: what is left must shrink
/// at least every minute and a half: an announcement that its worker could not act on, as a lock was
/// in the way, is repeated after a minute.
pub async fn finished(fleet: &Fleet, created: usize) {
    let left = "select count(*) from tasks where status in ('pending', 'running')";
    let (mut least, mut at) = (usize::MAX, Instant::now());
    loop {
        let left: usize = fleet.db.value(left).await.parse().unwrap();
        if left == 0 {
            return;
        }
        if left < least {
            (least, at) = (left, Instant::now());
        }
        if at.elapsed() > Duration::from_secs(90) {
            let stuck = "select json_agg(t) from (select id, title, status, claimed_by, claim_epoch, codebase_id,
                run_at - now() as run_in, lease_expires_at - now() as lease, due, ready_xid from tasks
                where status in ('pending', 'running') limit 5) as t";
            let stuck = fleet.db.value(stuck).await;
            panic!("{left} of {created} tasks are stuck: {stuck}");
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Calls go to any replica, and the stream's own replica may never see the task being claimed.
#[tokio::test]
async fn p1_a_task_that_comes_back_through_another_replica_is_announced_again_at_once() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let mut stream = replicas[0].stream("worker_id=w&events=task_available").await;
    let id = replicas[1].create(json!({"title": "x", "max_attempts": 9})).await;
    assert_eq!(stream.announced().await, id);
    for round in 0..6 {
        replicas[1].claim(&id, "w").await.expect(200);
        let (verb, more) = match round % 3 {
            0 => ("release", json!({})),
            1 => ("fail", json!({"retry_after_seconds": 0})),
            _ => ("fail", json!({"retry_after_seconds": 0.4})),
        };
        replicas[1].finish(verb, &id, "w", more).await.expect(200);
        let again = stream.next_within(Duration::from_secs(5)).await;
        let again = again.as_ref().map(Event::task);
        assert_eq!(again, Some(id.as_str()), "round {round}: {verb}");
    }
}
