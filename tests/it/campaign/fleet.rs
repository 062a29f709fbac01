//! Some replicas of one database, each behind proxies that can be broken, each to be ended and
//! replaced. Clients know the proxies' addresses, which stay, as those of a load balancer would.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::Campaign;
use super::gremlin::Gremlin;
use super::wire::Wire;
use crate::support::{Replica, TestDb, eventually};

/// How long Postgres may be out of reach of a replica that starts.
const START_PATIENCE: Duration = Duration::from_secs(90);

/// Replicas, and what happened to their clients.
pub struct Fleet {
    pub db: TestDb,
    pub slots: Vec<Slot>,
    /// While set, every call is sent to two replicas at once.
    pub is_doubling: AtomicBool,
    pub tally: Tally,
    flags: Vec<String>,
}

/// The place of one replica.
pub struct Slot {
    /// In front of its calls.
    pub calls: Gremlin,
    /// In front of its streams.
    pub streams: Gremlin,
    /// Between it and Postgres.
    pub postgres: Wire,
    database_url: String,
    /// Whoever does something to the replica holds this meanwhile.
    pub replica: Mutex<Option<Replica>>,
}

/// Counts of what clients saw.
#[derive(Default)]
pub struct Tally {
    pub calls: AtomicUsize,
    /// Calls whose answer did not arrive whole.
    pub unanswered: AtomicUsize,
    /// Calls that were told to come back: 408, 503.
    pub put_off: AtomicUsize,
    /// Streams that were opened.
    pub connects: AtomicUsize,
    /// Starts of a replica that ended before it served, as Postgres was away.
    pub failed_starts: AtomicUsize,
    /// How long replicas took to end after SIGTERM.
    pub drains: std::sync::Mutex<Vec<Duration>>,
    /// Whatever must not be. The run goes on, and fails at its end.
    pub violations: std::sync::Mutex<Vec<String>>,
}

impl Tally {
    pub fn violation(&self, what: String) {
        eprintln!("VIOLATION: {what}");
        self.violations.lock().unwrap().push(what);
    }

    /// Calls, those without an answer, those that were put off.
    pub fn counts(&self) -> String {
        let of = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        format!(
            "{} calls ({} unanswered, {} put off)",
            of(&self.calls),
            of(&self.unanswered),
            of(&self.put_off)
        )
    }

    #[track_caller]
    pub fn expect_no_violation(&self) {
        let violations = self.violations.lock().unwrap();
        let first: Vec<_> = violations.iter().take(20).collect();
        assert!(violations.is_empty(), "{} violations: {first:#?}", violations.len());
    }
}

impl Fleet {
    pub async fn start(campaign: &Campaign, replicas: usize, flags: &[&str]) -> Arc<Self> {
        let db = TestDb::new().await;
        let url = db.url.clone();
        Self::on(campaign, db, &url, replicas, flags).await
    }

    /// Replicas of a database, by a URL of their own.
    pub async fn on(
        campaign: &Campaign,
        db: TestDb,
        server_url: &str,
        replicas: usize,
        flags: &[&str],
    ) -> Arc<Self> {
        let (front, rest) = server_url.rsplit_once('@').unwrap();
        let (target, path) = rest.split_once('/').unwrap();
        let mut slots = Vec::new();
        for n in 0..replicas {
            let postgres = Wire::to(target.to_owned()).await;
            slots.push(Slot {
                calls: Gremlin::new(campaign.rng("gremlin of calls", n)).await,
                streams: Gremlin::new(campaign.rng("gremlin of streams", n)).await,
                database_url: format!("{front}@{}/{path}", postgres.address),
                postgres,
                replica: Mutex::default(),
            });
        }
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        let (is_doubling, tally) = (AtomicBool::new(false), Tally::default());
        let fleet = Arc::new(Self { db, slots, is_doubling, tally, flags });
        for slot in &fleet.slots {
            let mut replica = slot.replica.lock().await;
            fleet.boot(slot, &mut replica).await;
        }
        fleet
    }

    /// Puts a new replica into a slot.
    pub async fn boot(&self, slot: &Slot, replica: &mut Option<Replica>) {
        let begun = Instant::now();
        let new = loop {
            let command = self.command(&slot.database_url);
            match Replica::try_spawn(command, START_PATIENCE).await {
                Ok(new) => break new,
                // A start may end for want of Postgres. Who serves never ends by itself.
                Err(why) if begun.elapsed() < START_PATIENCE => {
                    assert!(!why.contains("panicked"), "{why}");
                    self.tally.failed_starts.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Err(why) => panic!("{why}"),
            }
        };
        let address = new.url.strip_prefix("http://").unwrap().parse().unwrap();
        *replica = Some(new);
        slot.lead_to(Some(address));
    }

    /// How a replica is started that reaches Postgres by this URL.
    pub fn command(&self, database_url: &str) -> std::process::Command {
        let mut flags = vec!["--database-url", database_url];
        flags.extend(self.flags.iter().map(String::as_str));
        Replica::command(&self.db, &flags)
    }

    /// Waits until every replica may end claims: silence is judged only after a steady lease.
    pub async fn steady(&self, lease: usize) {
        let steady = format!(
            "select count(*) from replicas where steady_since < now() - interval '{lease} s'"
        );
        eventually("every replica is steady", async || {
            (self.db.value(&steady).await == self.slots.len().to_string()).then_some(())
        })
        .await;
    }

    /// The replicas are alive, never panicked and never answered 500; Postgres holds nothing open.
    pub async fn expect_sound(&self) {
        for slot in &self.slots {
            let mut replica = slot.replica.lock().await;
            let replica = replica.as_mut().expect("a replica in each slot");
            expect_alive(replica);
            eventually("it is ready", async || {
                (replica.get("/readyz").await.status == 200).then_some(())
            })
            .await;
            expect_calm(replica);
            let metrics = replica.get("/metrics").await.text;
            assert!(!metrics.contains("status=\"500\""), "{metrics}");
        }
        let open = "select count(*) from pg_stat_activity
                     where datname = current_database() and application_name like 'taskwire%'
                       and state like 'idle in transaction%' and state_change < now() - interval '1 s'";
        assert_eq!(self.db.value(open).await, "0", "transactions left open");
        self.tally.expect_no_violation();
    }
}

/// A replica that serves never ends by itself (P10).
fn expect_alive(replica: &mut Replica) {
    let ended = replica.has_ended();
    assert!(ended.is_none(), "a replica ended by itself: {ended:?}");
}

/// Nothing in its log that must never be there.
pub fn expect_calm(replica: &Replica) {
    let log = replica.log();
    for line in log.lines().filter(|line| !line.contains("DEBUG")) {
        assert!(!line.contains("panicked") && !line.contains("ERROR"), "{line}");
    }
}

impl Slot {
    fn lead_to(&self, address: Option<std::net::SocketAddr>) {
        self.calls.lead_to(address);
        self.streams.lead_to(address);
    }

    /// Where the replica serves and its pid, if there is one and nobody does anything to it.
    pub fn at(&self) -> Option<(String, u32)> {
        let replica = self.replica.try_lock().ok()?;
        replica.as_ref().map(|replica| (replica.url.clone(), replica.pid()))
    }

    /// SIGKILL: no farewell.
    pub fn kill(&self, replica: &mut Option<Replica>) {
        let Some(mut old) = replica.take() else { return };
        expect_alive(&mut old);
        expect_calm(&old);
        self.lead_to(None);
        old.kill();
    }

    /// SIGTERM: it drains, and must be gone in time.
    pub async fn drain(&self, replica: &mut Option<Replica>, tally: &Tally) {
        let Some(mut old) = replica.take() else { return };
        expect_alive(&mut old);
        self.lead_to(None);
        old.signal("TERM");
        // The drain of 1 s, its grace of 2 s, the farewell of 1 s, and a busy machine.
        let begun = Instant::now();
        let ended = old.ends_within(Duration::from_secs(8)).await;
        assert!(ended.is_some(), "it did not end in time");
        tally.drains.lock().unwrap().push(begun.elapsed());
        expect_calm(&old);
    }
}
