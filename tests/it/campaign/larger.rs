//! The larger faults: what they need, and how each strikes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rand::RngExt;
use rand::rngs::StdRng;
use tokio::sync::Mutex;
use tokio::time::sleep;

use super::cluster::{Cluster, Stop};
use super::faults::{Fault, World, between, stopped};
use super::fleet::Slot;
use super::gremlin::Trick;
use super::ledger::Ledger;
use super::outages::Outages;
use super::processes::Processes;
use super::weather::Weather;
use super::wire::{Mode, Whose};
use crate::support::{Replica, SseStream};

/// How long a crowd may take to be back, on a machine that does everything else, too.
const CROWD_BACK_WITHIN: Duration = Duration::from_secs(30);

/// What the larger faults need besides a fleet and workers.
pub struct More {
    pub cluster: Arc<Cluster>,
    pub weather: Arc<Weather>,
    pub ledger: Arc<Ledger>,
    pub outages: Outages,
    /// One outage at a time.
    pub outage: Mutex<()>,
    /// For calls, with a time limit, and for streams, without.
    pub http: reqwest::Client,
    pub streams: reqwest::Client,
    pub processes: Processes,
    /// The longest that anything is broken.
    pub longest: Duration,
    /// Streams of a crowd.
    pub crowd: usize,
    /// Rows that come and go at once.
    pub rows: usize,
    /// Replicas that are started at once.
    pub copies: usize,
}

impl Fault {
    pub async fn strike_larger(self, world: &World, rng: &mut StdRng) {
        let Some(more) = &world.more else { return };
        let fleet = &world.fleet;
        let slot = &fleet.slots[rng.random_range(0..fleet.slots.len())];
        let wire = &slot.postgres;
        // Mostly short: what is long is rare, or nothing would be done in between.
        let share = rng.random_range(0.1_f64..1.0).powi(3).max(0.1);
        let lasting = more.longest.mul_f64(share).max(Duration::from_millis(1_500));
        match self {
            Self::PostgresRestarted => world.postgres_stops(more, Stop::Fast, Duration::ZERO).await,
            Self::PostgresCrashed => {
                world.postgres_stops(more, Stop::Immediate, Duration::ZERO).await;
            }
            Self::PostmasterKilled => world.postgres_stops(more, Stop::Kill, Duration::ZERO).await,
            Self::PostgresAway => {
                let how = [Stop::Fast, Stop::Immediate, Stop::Kill][rng.random_range(0..3)];
                world.postgres_stops(more, how, lasting).await;
            }
            Self::PostgresFrozen => {
                let _one_at_a_time = more.outage.lock().await;
                more.cluster.freeze(lasting);
                sleep(lasting).await;
            }
            Self::ConnectionsUsedUp => world.connections_used_up(more, lasting).await,
            Self::LoginsRefused => world.logins_refused(lasting).await,
            Self::WireReset => {
                for _ in 0..rng.random_range(1..=4) {
                    wire.cut_once(Whose::All, true);
                    sleep(between(rng, 100, 500)).await;
                }
            }
            Self::ListenerReset => wire.cut_once(Whose::Listeners, true),
            Self::WireStalled => broken(slot, Mode::Stall, Whose::All, lasting).await,
            Self::ListenerStalled => broken(slot, Mode::Stall, Whose::Listeners, lasting).await,
            Self::WireSlow => {
                let delay = between(rng, 50, 500);
                broken(slot, Mode::Delay(delay), Whose::All, lasting).await;
            }
            Self::NotificationsLost => muted(world, false, lasting).await,
            Self::AnnouncementsLost => muted(world, true, lasting).await,
            Self::DeafListener => world.deaf_listener(more, lasting).await,
            Self::ManyRows => world.many_rows(more.rows, rng).await,
            Self::ReplicaStoppedLong => stopped(slot, lasting.max(more.longest / 2)).await,
            Self::DescriptorsUsedUp => {
                descriptors_used_up(slot, lasting.min(Duration::from_secs(6))).await;
            }
            Self::ReplicasAdded => replicas_added(world, more, rng).await,
            Self::CrowdDrained => {
                let streams = crowd(more, &format!("http://{}", slot.streams.address)).await;
                let mut replica = slot.replica.lock().await;
                slot.drain(&mut replica, &fleet.tally).await;
                fleet.boot(slot, &mut replica).await;
                drop(streams);
            }
            Self::CrowdCut => {
                let server = format!("http://{}", slot.streams.address);
                let (alone, mut streams) = (more.weather.single(), crowd(more, &server).await);
                slot.streams.cut_all();
                let begun = Instant::now();
                while streams.len() < more.crowd && begun.elapsed() < CROWD_BACK_WITHIN {
                    streams = crowd(more, &server).await;
                }
                let is_alone = alone.is_some() && alone == more.weather.single();
                if is_alone && streams.len() < more.crowd {
                    let back = streams.len();
                    more.ledger.violation(format!("only {back} streams of a crowd are back (F41)"));
                }
            }
            Self::StreamsFrozen => {
                slot.streams.play(&[Trick::Stall], 100);
                sleep(lasting).await;
                slot.streams.cut_all();
                slot.streams.behave();
            }
            Self::StreamsCutByAge => {
                let age = Some(between(rng, 500, 2_000));
                fleet.slots.iter().for_each(|slot| slot.streams.cut_at_age(age));
                sleep(lasting).await;
                fleet.slots.iter().for_each(|slot| slot.streams.cut_at_age(None));
            }
            Self::ProcessesKilled => more.processes.kill_some(rng),
            Self::ProcessesStopped => {
                let pause = world.lease + between(rng, 500, 2_500);
                more.processes.stop_some(rng, pause).await;
            }
            _ => {
                if let Some((url, _)) = slot.at() {
                    self.strike_server(more, &url, lasting).await;
                }
            }
        }
    }
}

async fn broken(slot: &Slot, mode: Mode, whose: Whose, during: Duration) {
    let _mine = slot.postgres.breaking.lock().await;
    slot.postgres.set(mode, whose);
    sleep(during).await;
    slot.postgres.mend();
}

/// Every replica's notifications are lost, long enough to measure.
async fn muted(world: &World, canaries: bool, during: Duration) {
    let slots = &world.fleet.slots;
    let _all = join_all(slots.iter().map(|slot| slot.postgres.breaking.lock())).await;
    for slot in slots {
        slot.postgres.set(Mode::Mute { canaries }, Whose::All);
    }
    sleep(during.max(Duration::from_secs(4))).await;
    for slot in slots {
        slot.postgres.mend();
    }
}

/// Streams of many workers, as many as could be opened.
async fn crowd(more: &More, server: &str) -> Vec<SseStream> {
    let opened = (0..more.crowd).map(|n| async move {
        let query = format!("worker_id=crowd-{n}&codebases=nobody");
        SseStream::try_open(&more.streams, server, &query).await
    });
    join_all(opened).await.into_iter().flatten().collect()
}

/// The replica may open hardly any more files for a while, and is asked for many.
async fn descriptors_used_up(slot: &Slot, during: Duration) {
    let replica = slot.replica.lock().await;
    let Some(replica) = replica.as_ref() else { return };
    let folder = format!("/proc/{}/fd", replica.pid());
    let open = std::fs::read_dir(folder).map_or(0, Iterator::count);
    let before = soft_limit(replica).await;
    if before.is_none() || !limit(replica, &(open + 8).to_string()).await {
        eprintln!("prlimit is missing: file descriptors are not used up");
        return;
    }
    let address = replica.url.trim_start_matches("http://");
    let burst = join_all((0..60).map(|_| tokio::net::TcpStream::connect(address))).await;
    sleep(during).await;
    drop(burst);
    limit(replica, &before.unwrap_or_default()).await;
}

async fn soft_limit(replica: &Replica) -> Option<String> {
    let mut command = tokio::process::Command::new("prlimit");
    command.args(["--pid", &replica.pid().to_string(), "--nofile", "-o", "SOFT", "--noheadings"]);
    let output = command.output().await.ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

async fn limit(replica: &Replica, soft: &str) -> bool {
    let mut command = tokio::process::Command::new("prlimit");
    command.args(["--pid", &replica.pid().to_string(), &format!("--nofile={soft}:")]);
    command.status().await.is_ok_and(|status| status.success())
}

/// More replicas of the same database, all at once; some of them are told to go, the others killed.
async fn replicas_added(world: &World, more: &More, rng: &mut StdRng) {
    let command = || world.fleet.command(&more.cluster.server_url);
    let patience = Duration::from_secs(40);
    let started = (0..more.copies).map(|_| Replica::try_spawn(command(), patience));
    for started in join_all(started).await {
        match started {
            Ok(mut replica) if rng.random() => {
                replica.signal("TERM");
                if replica.ends_within(Duration::from_secs(8)).await.is_none() {
                    more.ledger.violation("a drain took more than 8 s (P13)".to_owned());
                }
            }
            Ok(replica) => replica.kill(),
            // As at any start, Postgres may be away.
            Err(why) if why.contains("panicked") => more.ledger.violation(why),
            Err(_) => {
                world.fleet.tally.failed_starts.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
    }
}
