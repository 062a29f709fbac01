//! Everything at once, for as long as asked: real replicas, a real Postgres of its own, workers with
//! and without streams, real worker processes, an operator; and one to three faults at any time. At
//! the end every acknowledged task is finished exactly once, or the run has failed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::{AssertSqlSafe, Row};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::caller::{Caller, http};
use super::cluster::Cluster;
use super::faults::{FAULTS, Fault, LARGER_FAULTS, World, schedule};
use super::fleet::Fleet;
use super::larger::More;
use super::ledger::{Ledger, UNHEARD};
use super::outages::Outages;
use super::p1_ledger::{finished, join};
use super::processes::{CODEBASE, Processes};
use super::producers::{ATTEMPTS, GROUPS, create, some};
use super::weather::{Weather, shares};
use super::witnesses;
use super::workers::{Control, Worker};
use super::{Campaign, words};
use crate::support::http_client;

/// Faults at the same time, at most (F60).
const AT_ONCE: usize = 3;
/// Producers wait while more tasks than this are unfinished: the machine bears what it bears.
const BACKLOG_MAX: usize = 3_000;
/// No task is completed for so long: then the run is stuck, whatever is broken.
const STUCK_AFTER: Duration = Duration::from_mins(3);
/// No fault takes so long.
const STRIKE_MAX: Duration = Duration::from_mins(6);
/// Between two lines about how it goes.
const LINE_EVERY: Duration = Duration::from_mins(1);
/// Tasks of one batch of a producer, at most.
const BATCH_MAX: usize = 40;

/// The numbers of a run: a short one for CI, and what a long one takes by default.
struct Numbers {
    during: Duration,
    gap: Duration,
    replicas: usize,
    workers: usize,
    producers: usize,
    tasks_per_second: usize,
    lease: usize,
}

impl Numbers {
    fn of(campaign: &Campaign, kinds: usize) -> Self {
        let minutes = campaign.number("MINUTES", 0);
        let (is_long, seconds) = (minutes > 0, campaign.number("SECONDS", 100));
        let during = Duration::from_secs(if is_long { minutes * 60 } else { seconds } as u64);
        let either = |name, short, long| campaign.number(name, if is_long { long } else { short });
        let dense = usize::try_from(during.as_millis()).unwrap() / (kinds + 1);
        Self {
            during,
            gap: Duration::from_millis(either("GAP_MS", dense, 4_000) as u64),
            replicas: campaign.number("REPLICAS", 3),
            workers: either("WORKERS", 16, 36),
            producers: either("PRODUCERS", 3, 8),
            tasks_per_second: either("RATE", 40, 250),
            lease: campaign.number("LEASE", 2),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_breaks_and_no_acknowledged_task_is_lost_or_finished_twice() {
    let campaign = Campaign::new("campaign::everything");
    // Some kinds alone show which of them it was.
    let only = words("ONLY");
    let is_wanted = |fault: &Fault| only.is_empty() || only.contains(&format!("{fault:?}"));
    let kinds: Vec<_> = FAULTS.into_iter().chain(LARGER_FAULTS).filter(is_wanted).collect();
    assert!(!kinds.is_empty(), "TASKWIRE_CAMPAIGN_ONLY names no kind of faults");
    let numbers = Numbers::of(&campaign, kinds.len());
    let (world, more) = start(&campaign, &numbers).await;
    let fleet = Arc::clone(&world.fleet);
    let backlog = Arc::new(AtomicUsize::new(0));
    let closing = Arc::new(Control::default());

    let (producing, working) = people(&campaign, &numbers, &world, &more, &backlog, &closing);
    let run = async {
        strike(&campaign, &numbers, &kinds, &world, &more).await;
        closing.close();
        join(producing).await;
        finished(&fleet, more.ledger.created_count()).await;
    };
    tokio::select! {
        () = run => {}
        why = watch(&world, &more, &backlog) => panic!("{why}"),
    }
    world.workers.iter().for_each(|worker| worker.close());
    join(working).await;
    fleet.expect_sound().await;
    let figures = more.ledger.prove(&fleet.db).await;
    let of = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    let drains = shares(&mut fleet.tally.drains.lock().unwrap());
    eprintln!("{}", more.weather.table());
    campaign.figures(&format!(
        "{} faults; {figures}; violations 0\n  {}; {} streams opened by {} workers; {} replicas, {} starts \
         failed for want of Postgres, drains {drains}\n  {}\n  {}\n  {}\n  {} statements of the operator refused",
        more.weather.fault_count(),
        fleet.tally.counts(),
        of(&fleet.tally.connects),
        numbers.workers,
        numbers.replicas,
        of(&fleet.tally.failed_starts),
        more.outages.figures(),
        more.weather.delays(),
        more.processes.figures(),
        of(&world.refused),
    ));
}

async fn start(campaign: &Campaign, numbers: &Numbers) -> (Arc<World>, Arc<More>) {
    let (cluster, db) = Cluster::new().await;
    let lease = numbers.lease.to_string();
    let flags = ["--lease-seconds", &lease, "--worker-sse-timeout", "30"];
    let fleet = Fleet::on(campaign, db, &cluster.server_url, numbers.replicas, &flags).await;
    let servers: Vec<_> =
        fleet.slots.iter().map(|slot| format!("http://{}", slot.calls.address)).collect();
    let is_long = numbers.during > Duration::from_mins(5);
    let either = |name, short, long| campaign.number(name, if is_long { long } else { short });
    let more = Arc::new(More {
        cluster: Arc::new(cluster),
        weather: Arc::new(Weather::default()),
        ledger: Arc::new(Ledger::default()),
        outages: Outages::default(),
        outage: tokio::sync::Mutex::default(),
        http: http(),
        streams: http_client().build().unwrap(),
        processes: Processes::start(either("REAL_WORKERS", 2, 6), &servers),
        longest: Duration::from_secs(either("LONGEST", 4, 30) as u64),
        crowd: either("CROWD", 60, 500),
        rows: either("ROWS", 5_000, 100_000),
        copies: either("COPIES", 2, 10),
    });
    let world = World {
        fleet,
        workers: (0..numbers.workers).map(|_| Arc::default()).collect(),
        lease: Duration::from_secs(numbers.lease as u64),
        more: Some(Arc::clone(&more)),
        refused: AtomicUsize::new(0),
    };
    (Arc::new(world), more)
}

/// Everyone who uses the servers: producers and an operator, who end when told, and workers.
fn people(
    campaign: &Campaign,
    numbers: &Numbers,
    world: &Arc<World>,
    more: &Arc<More>,
    backlog: &Arc<AtomicUsize>,
    closing: &Arc<Control>,
) -> (JoinSet<()>, JoinSet<()>) {
    let caller = |part: &str, n| Caller::new(&world.fleet, &more.http, campaign.rng(part, n));
    let (mut producing, mut working) = (JoinSet::new(), JoinSet::new());
    for n in 0..numbers.producers {
        let (ledger, backlog, closing) =
            (Arc::clone(&more.ledger), Arc::clone(backlog), Arc::clone(closing));
        let mut caller = caller("producer", n);
        let each = Duration::from_secs(numbers.producers as u64) / number(numbers.tasks_per_second);
        producing.spawn(async move {
            let (mut made, mut due) = (0, tokio::time::Instant::now());
            while !closing.is_closing() {
                if backlog.load(Ordering::Relaxed) > BACKLOG_MAX {
                    sleep(Duration::from_millis(100)).await;
                    due = tokio::time::Instant::now();
                    continue;
                }
                let size = some(&mut caller, &format!("p{n}-{made}"), &ledger, BATCH_MAX).await;
                made += size;
                due += each * number(size);
                tokio::time::sleep_until(due).await;
            }
        });
    }
    producing.spawn(operator(Arc::clone(world), Arc::clone(more), Arc::clone(closing)));
    if !more.processes.is_empty() {
        let (more, closing, mut caller) =
            (Arc::clone(more), Arc::clone(closing), caller("real work", 0));
        producing.spawn(async move {
            for n in 0.. {
                if closing.is_closing() {
                    return;
                }
                let title = format!("{UNHEARD}{n}");
                let body =
                    json!({"title": title, "codebase_id": CODEBASE, "max_attempts": ATTEMPTS});
                create(&mut caller, &body, &more.ledger).await;
                caller.pause(500, 1_500).await;
            }
        });
    }
    for n in 0..world.fleet.slots.len() {
        let (heard, ears) = mpsc::unbounded_channel();
        let maker = caller("witness maker", n);
        producing.spawn(witnesses::make(maker, n, Arc::clone(more), Arc::clone(closing)));
        tokio::spawn(witnesses::hear(n, Arc::clone(world), Arc::clone(more), heard));
        tokio::spawn(witnesses::work(caller("witness", n), n, Arc::clone(more), ears));
    }
    for (n, control) in world.workers.iter().enumerate() {
        let (ledger, streams) = (Arc::clone(&more.ledger), more.streams.clone());
        let (caller, control) = (caller("worker", n), Arc::clone(control));
        working.spawn(Worker { n, has_stream: n % 5 != 4, caller, ledger, control, streams }.run());
    }
    (producing, working)
}

fn number(count: usize) -> u32 {
    u32::try_from(count).expect("a small number")
}

/// Someone who makes tasks by SQL. What got no answer is there or not, as a whole.
async fn operator(world: Arc<World>, more: Arc<More>, closing: Arc<Control>) {
    for n in 0.. {
        if closing.is_closing() {
            return;
        }
        let size = 1 + n % 7;
        let insert = format!(
            "insert into tasks (title, codebase_id, priority, max_attempts)
             select 'sql-{n}/' || i, 'group-' || ({n} + i) % {GROUPS}, i, {ATTEMPTS} from generate_series(1, {size}) as i
             returning id::text, title"
        );
        let inserted = sqlx::raw_sql(AssertSqlSafe(insert)).fetch_all(&world.fleet.db.pool);
        match timeout(Duration::from_secs(30), inserted).await {
            Ok(Ok(rows)) => {
                for row in rows {
                    more.ledger.created(row.get(0), row.get(1));
                }
            }
            _ => more.ledger.batch_unanswered(&format!("sql-{n}"), size),
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// One fault after the other, up to three at once; at first only lost announcements, to see what these
/// alone cost. Each kind strikes at least once.
async fn strike(
    campaign: &Campaign,
    numbers: &Numbers,
    kinds: &[Fault],
    world: &Arc<World>,
    more: &Arc<More>,
) {
    let count = kinds.len() + numbers.during.as_millis().div_ceil(numbers.gap.as_millis()) as usize;
    let planned = schedule(campaign, kinds, count, numbers.gap);
    sleep(Duration::from_secs(5)).await;
    more.weather.begins(Fault::AnnouncementsLost);
    Fault::AnnouncementsLost.strike(world, &mut campaign.rng("first", 0)).await;
    more.weather.ends(Fault::AnnouncementsLost);

    let (begun, permits) = (Instant::now(), Arc::new(Semaphore::new(AT_ONCE)));
    let mut striking = JoinSet::new();
    for (n, (fault, gap)) in planned.into_iter().enumerate() {
        // The plan's times are the point: two or three faults may meet.
        sleep(gap).await;
        if begun.elapsed() > numbers.during && n >= kinds.len() {
            break;
        }
        let permit = Arc::clone(&permits).acquire_owned().await.unwrap();
        while let Some(done) = striking.try_join_next() {
            if let Err(error) = done {
                std::panic::resume_unwind(error.into_panic());
            }
        }
        let (world, more, mut rng) =
            (Arc::clone(world), Arc::clone(more), campaign.rng("fault", n));
        striking.spawn(async move {
            let from = begun.elapsed().as_secs_f64();
            more.weather.begins(fault);
            let struck = timeout(STRIKE_MAX, fault.strike(&world, &mut rng)).await;
            more.weather.ends(fault);
            drop(permit);
            eprintln!("{from:8.2} s to {:8.2} s: {fault:?}", begun.elapsed().as_secs_f64());
            assert!(struck.is_ok(), "{fault:?} does not end");
        });
    }
    join(striking).await;
}

/// Looks how it goes. Returns only when nothing goes any more: why.
async fn watch(world: &World, more: &More, backlog: &AtomicUsize) -> String {
    let begun = Instant::now();
    let (mut most, mut at, mut line) = (0, Instant::now(), Instant::now());
    loop {
        sleep(Duration::from_secs(1)).await;
        more.processes.look_after();
        let left = "select count(*) from tasks where status in ('pending', 'running') and codebase_id <> 'foreign'";
        if let Some(left) = world.fleet.db.try_value(left).await {
            backlog.store(left.parse().unwrap_or_default(), Ordering::Relaxed);
        }
        let counts = more.ledger.counts();
        if counts.completed > most {
            (most, at) = (counts.completed, Instant::now());
        }
        if line.elapsed() > LINE_EVERY {
            line = Instant::now();
            eprintln!(
                "{:3} min: {} tasks made, {} completed, {} left, {} claims, {} stale ends refused, {} violations; {} faults, now {:?}; {}",
                begun.elapsed().as_secs() / 60,
                counts.created,
                counts.completed,
                backlog.load(Ordering::Relaxed),
                counts.claims,
                counts.stale,
                counts.violations,
                more.weather.fault_count(),
                more.weather.active(),
                world.fleet.tally.counts(),
            );
        }
        if at.elapsed() > STUCK_AFTER && backlog.load(Ordering::Relaxed) > 0 {
            let stuck = "select json_agg(t) from (select id, title, status, claimed_by, claim_epoch, codebase_id,
                due, run_at - now() as run_in, lease_expires_at - now() as lease from tasks
                where status in ('pending', 'running') limit 5) as t";
            return format!(
                "nothing was completed for {STUCK_AFTER:?}: {counts:?}, active {:?}, tasks {:?}, Postgres: {}",
                more.weather.active(),
                world.fleet.db.try_value(stuck).await,
                more.cluster.log(),
            );
        }
    }
}
