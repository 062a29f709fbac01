//! A rolling restart of three replicas behind a proxy, second by second (P13, F27).

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::configs::Setup;
use super::crew::{Crew, Return, Worker};
use super::process::Kind;
use super::{Proxied, streams_on};
use crate::campaign::Campaign;
use crate::support::eventually;

const REPLICAS: usize = 3;
/// The server's own: for requests in flight after the drain, and for its farewell.
const GRACE: Duration = Duration::from_secs(3);
/// In the small form other tests run at the same time; the large one is held to the second.
const BUSY: Duration = Duration::from_secs(4);
const LARGE: usize = 1_000;
/// P13: reconnects a second, over those of an even drain. And what chance adds in a small run.
const PEAK: f64 = 1.5;
const PEAK_SLACK: f64 = 10.0;
/// Between two replicas, so that what comes late shows up.
const BETWEEN: Duration = Duration::from_secs(1);
const SECOND: Duration = Duration::from_secs(1);

/// Writes down each second.
struct Log {
    begun: Instant,
    events: Mutex<Vec<String>>,
    /// The most streams that were opened in one second since it was last asked.
    peak: AtomicUsize,
}

impl Log {
    fn event(&self, what: String) {
        self.events.lock().unwrap().push(what);
    }

    fn start(crew: &Arc<Crew>, replicas: Vec<SocketAddr>) -> (Arc<Self>, JoinHandle<()>) {
        let (events, peak) = (Mutex::default(), AtomicUsize::new(0));
        let log = Arc::new(Self { begun: Instant::now(), events, peak });
        eprintln!(
            "   s   streams on each replica   opened  refused  broken  created    done  calls repeated"
        );
        let watch = Arc::clone(&log).watch(Arc::clone(crew), replicas);
        (log, tokio::spawn(watch))
    }

    async fn watch(self: Arc<Self>, crew: Arc<Crew>, replicas: Vec<SocketAddr>) {
        let http = crate::support::http_client().build().unwrap();
        let mut beat = tokio::time::interval(SECOND);
        beat.tick().await;
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut before, mut looked) = (counts(&crew), Instant::now());
        loop {
            beat.tick().await;
            let (now, passed) = (counts(&crew), looked.elapsed());
            looked = Instant::now();
            let asks = replicas.iter().map(|&one| streams_on(&http, one));
            let streams = futures_util::future::join_all(asks).await;
            let streams: Vec<_> = streams
                .iter()
                .map(|count| count.map_or("away".to_owned(), |count| count.to_string()))
                .collect();
            let since: Vec<_> = now.iter().zip(before).map(|(now, before)| now - before).collect();
            before = now;
            // On a busy machine it looks late.
            let opened = Duration::from_secs(since[0] as u64).div_duration_f64(passed);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
            self.peak.fetch_max(opened.round() as usize, Relaxed);
            eprintln!(
                "{:>4}   {:>6} {:>6} {:>6}       {:>6}  {:>7}  {:>6}  {:>7}  {:>6}  {:>6}   {}",
                self.begun.elapsed().as_secs(),
                streams[0],
                streams[1],
                streams[2],
                since[0],
                since[1],
                since[2],
                since[3],
                since[4],
                since[5],
                self.events.lock().unwrap().drain(..).collect::<Vec<_>>().join("; "),
            );
        }
    }
}

fn counts(crew: &Crew) -> [usize; 6] {
    let tally = &crew.tally;
    [
        &tally.opened,
        &tally.refused,
        &tally.broken,
        &tally.created,
        &tally.completed,
        &tally.repeated_calls,
    ]
    .map(|count| count.load(Relaxed))
}

/// Rolls all replicas once. Gives the figures.
async fn rolls(campaign: &Campaign, kind: Kind) {
    let streams = campaign.number("STREAMS", 150);
    let drain = campaign.number("DRAIN_SECONDS", 2);
    let active = campaign.number("ACTIVE", 20).min(streams);
    let rate = u32::try_from(campaign.number("RATE", 30)).expect("a small number");
    let flags = ["--drain-seconds", &drain.to_string()];
    let Some(mut behind) = Proxied::start_many(kind, Setup::Shipped, REPLICAS, &flags).await else {
        return;
    };
    let crew = Crew::new(behind.address(), Return::AsTold);
    let codebases: Vec<_> = (0..active).map(|n| format!("group-{n}")).collect();
    let worker = |n: usize| Worker {
        id: format!("w-{n}"),
        codebases: codebases[n % active].clone(),
        acts: n < active,
    };
    let (log, watch) = Log::start(&crew, behind.addresses.clone());
    log.event("workers connect".to_owned());
    let hired = crew.hire((0..streams).map(worker).collect()).await;
    all_connected(&crew, streams).await;
    let producer = crew.produce(codebases.clone(), rate);
    tokio::time::sleep(BETWEEN).await;
    log.peak.store(0, Relaxed);

    let drain = Duration::from_secs(drain as u64);
    let busy = if streams < LARGE { BUSY } else { Duration::ZERO };
    let (mut moved, mut slowest, mut peak) = (0, Duration::ZERO, 0);
    for n in 0..REPLICAS {
        let there = eventually("it serves", || streams_on(&behind.http, behind.addresses[n])).await;
        log.event(format!("SIGTERM to replica {}", n + 1));
        let mut old = behind.replicas[n].take().expect("it runs");
        let asked = Instant::now();
        old.signal("TERM");
        let ended = old.ends_within(drain + 3 * GRACE).await;
        let took = asked.elapsed();
        log.event(format!("it ended after {:.2} s", took.as_secs_f64()));
        assert!(ended.is_some_and(|status| status.success()), "{ended:?}: {}", old.log());
        assert!(took <= drain + GRACE + busy, "it ended after {took:?}");
        crate::campaign::fleet::expect_calm(&old);
        behind.boot(n).await;
        log.event(format!("replica {} is back", n + 1));
        all_connected(&crew, streams).await;
        tokio::time::sleep(BETWEEN).await;
        let most = log.peak.swap(0, Relaxed);
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let allowed = PEAK * there as f64 / drain.as_secs_f64() + PEAK_SLACK;
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let is_even = most as f64 <= allowed;
        assert!(is_even, "{most} reconnects in a second, {allowed:.0} are allowed");
        (moved, slowest, peak) = (moved + there, slowest.max(took), peak.max(most));
    }
    producer.stop().await;
    crew.prove(&behind.db).await;
    watch.abort();
    let [opened, refused, broken, created, completed, repeated] = counts(&crew);
    crew.dismiss(hired);
    campaign.figures(&format!(
        "{kind:?}: {streams} streams on {REPLICAS} replicas, drain {} s: slowest end {:.2} s; {} reconnects, \
         {moved} streams were on a replica that drained; {peak} a second at most; {refused} refused, \
         {broken} broke; {created} tasks created, {completed} done once each, 0 lost; {repeated} calls repeated ({})",
        drain.as_secs(),
        slowest.as_secs_f64(),
        opened - streams,
        crew.unanswered(),
    ));
    assert_eq!(broken, 0, "every stream ended with a farewell");
    assert_eq!(opened - streams, moved, "each stream reconnects once for each replica that drains");
}

async fn all_connected(crew: &Crew, streams: usize) {
    eventually("all workers are connected", async || {
        (crew.tally.open.load(Relaxed) == streams).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_behind_nginx_moves_each_stream_once_and_loses_nothing() {
    let campaign =
        Campaign::new("a_rolling_restart_behind_nginx_moves_each_stream_once_and_loses_nothing");
    rolls(&campaign, Kind::Nginx).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_behind_haproxy_moves_each_stream_once_and_loses_nothing() {
    let campaign =
        Campaign::new("a_rolling_restart_behind_haproxy_moves_each_stream_once_and_loses_nothing");
    rolls(&campaign, Kind::Haproxy).await;
}
