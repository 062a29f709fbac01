//! P9: a stuck reader only hurts itself. Also what a crowd of idle streams costs: memory, CPU, and how
//! long one task takes to reach all of them.

use std::fs;
use std::net::SocketAddr;
use std::ops::Range;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{Campaign, percentile};
use crate::support::{Replica, TestDb, eventually, programs};

/// Streams that connect at the same time.
const CONNECTING_MAX: usize = 200;
/// A peer that takes nothing, or answers nothing, is gone by then.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(30);
/// Bytes of a receive buffer that no window fits into.
const TINY: usize = 4096;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p9_stuck_and_vanished_clients_only_hurt_themselves() {
    let campaign = Campaign::new("p9_stuck_and_vanished_clients");
    let healthy = campaign.number("STREAMS", 300);
    let stuck = campaign.number("STUCK", 40);
    let vanished =
        if programs::find("nft").is_some() { campaign.number("VANISHED", 40) } else { 0 };
    let beats = campaign.number("BEATS", 12);
    let beat = Duration::from_millis(campaign.number("BEAT_MS", 250) as u64);
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--worker-sse-max-age", "0"]).await;
    let before = Cost::of(&replica);
    let begun = Instant::now();
    let crowd = Crowd::default();
    crowd.join(&replica, "healthy", healthy, Kind::Reader).await;
    let joined = begun.elapsed();
    sleep(Duration::from_secs(3)).await;
    let idle = Cost::of(&replica);
    let watched = Duration::from_secs(5);
    sleep(watched).await;
    let idle_cpu = Cost::of(&replica).cpu.saturating_sub(idle.cpu);
    let alone = crowd.beats(&replica, 0..beats, beat).await;

    crowd.join(&replica, "stuck", stuck, Kind::Stuck).await;
    let ports = crowd.join(&replica, "vanished", vanished, Kind::Reader).await;
    let unplugged = (vanished > 0).then(|| Unplugged::new(&ports)).flatten();
    // More than their sockets hold, at once.
    for _ in 0..3 {
        let prompt = "x".repeat(2 * TINY);
        replica.create(json!({"title": "x", "codebase_id": "filler", "prompt": prompt})).await;
    }
    let begun = Instant::now();
    let beside = crowd.beats(&replica, beats..2 * beats, beat).await;
    let left = if vanished > 0 && unplugged.is_none() { healthy + vanished } else { healthy };
    let more = async {
        for n in 0.. {
            // What no healthy stream hears of keeps something on the way to the others.
            replica.create(json!({"title": format!("beat {}", 1_000_000 + n)})).await;
            sleep(beat).await;
        }
    };
    let gone = eventually_within(GIVEN_UP_WITHIN + Duration::from_secs(5), async || {
        (open(&replica).await == left).then(|| begun.elapsed())
    });
    let gone = tokio::select! {
        gone = gone => gone,
        () = more => unreachable!("it never ends"),
    };
    let after = Cost::of(&replica);
    let queue = db.value("round((pg_notification_queue_usage() * 100)::numeric, 3)").await;
    let [(p50, p99), (p50_beside, p99_beside)] = [alone, beside].map(|mut sample| {
        assert_eq!(sample.len(), healthy * beats, "somebody did not hear of something");
        (percentile(&mut sample, 0.5), percentile(&mut sample, 0.99))
    });
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let each = (idle.rss_kib - before.rss_kib) as f64 / healthy as f64;
    campaign.figures(&format!(
        "{healthy} streams joined in {joined:.1?}; {each:.1} KiB of memory each; idle, all together \
         {:.1} % of a core; a task reached them in p50 {p50:.1?}, p99 {p99:.1?}; beside {stuck} stuck and \
         {vanished} vanished clients in p50 {p50_beside:.1?}, p99 {p99_beside:.1?}; those were gone after \
         {gone:.1?}; memory at the end {} MiB; notification queue {queue} %",
        idle_cpu.as_secs_f64() / watched.as_secs_f64() * 100.0,
        after.rss_kib / 1024,
    ));
    assert!(gone < GIVEN_UP_WITHIN, "{gone:?}");
    assert!(each < 64.0, "{each} KiB a stream");
    // A machine of two cores that runs other tests besides is no stop-watch.
    assert!(p99_beside < 3 * p99 + Duration::from_secs(1), "{p99:?}, {p99_beside:?}");
    super::fleet::expect_calm(&replica);
}

/// Waits for a condition for longer than usual.
async fn eventually_within<T>(limit: Duration, check: impl AsyncFn() -> Option<T>) -> T {
    let waiting = async {
        loop {
            if let Some(found) = check().await {
                return found;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(limit, waiting).await.expect("within the limit")
}

async fn open(replica: &Replica) -> usize {
    let ready = replica.get("/readyz").await.expect(200);
    usize::try_from(ready["streams"].as_u64().unwrap()).unwrap()
}

/// What a process has used so far.
struct Cost {
    rss_kib: u64,
    cpu: Duration,
}

impl Cost {
    fn of(replica: &Replica) -> Self {
        let read = |file| fs::read_to_string(format!("/proc/{}/{file}", replica.pid())).unwrap();
        let status = read("status");
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let rss_kib = rss.trim().trim_end_matches(" kB").parse().unwrap();
        let stat = read("stat");
        let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        // Hundredths of a second in user mode and in the kernel (proc(5)).
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Self { rss_kib, cpu: Duration::from_millis(ticks * 10) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reader,
    Stuck,
}

/// When which beat was heard, by the healthy.
type Heard = Arc<Mutex<Vec<(usize, Instant)>>>;

/// Streams without HTTP clients: ten thousand of those would not fit beside their server.
#[derive(Default)]
struct Crowd {
    heard: Heard,
    clients: Mutex<JoinSet<()>>,
}

impl Crowd {
    /// Connects so many; gives their ports.
    async fn join(&self, replica: &Replica, name: &str, count: usize, kind: Kind) -> Vec<u16> {
        let address: SocketAddr = replica.url.strip_prefix("http://").unwrap().parse().unwrap();
        let before = open(replica).await;
        let mut connecting = JoinSet::new();
        let slots = Arc::new(Semaphore::new(CONNECTING_MAX));
        for n in 0..count {
            let (slots, worker) = (Arc::clone(&slots), format!("{name}-{n}"));
            connecting.spawn(async move {
                let _slot = slots.acquire().await.unwrap();
                connect(address, &worker, kind).await
            });
        }
        let mut ports = Vec::new();
        while let Some(socket) = connecting.join_next().await {
            let socket = socket.unwrap();
            ports.push(socket.local_addr().unwrap().port());
            let heard = (name == "healthy").then(|| Arc::clone(&self.heard));
            self.clients.lock().unwrap().spawn(async move {
                match kind {
                    Kind::Reader => read(socket, heard).await,
                    Kind::Stuck => {
                        let _socket = socket;
                        std::future::pending::<()>().await;
                    }
                }
            });
        }
        eventually("all are streams", async || {
            (open(replica).await == before + count).then_some(())
        })
        .await;
        ports
    }

    /// Tasks at an even pace; how long each took to reach each healthy stream.
    async fn beats(
        &self,
        replica: &Replica,
        numbers: Range<usize>,
        beat: Duration,
    ) -> Vec<Duration> {
        let mut sent = Vec::new();
        for n in numbers.clone() {
            sent.push(Instant::now());
            let id = replica.create(json!({"title": format!("beat {n}")})).await;
            sleep(beat).await;
            // Nobody's window is to fill.
            replica.post(&format!("/v1/tasks/{id}/cancel"), json!({})).await.expect(200);
        }
        sleep(Duration::from_secs(2)).await;
        let heard = std::mem::take(&mut *self.heard.lock().unwrap());
        let ours = heard.into_iter().filter(|(n, _)| numbers.contains(n));
        ours.map(|(n, at)| at - sent[n - numbers.start]).collect()
    }
}

async fn connect(address: SocketAddr, worker: &str, kind: Kind) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    if kind == Kind::Stuck {
        socket.set_recv_buffer_size(u32::try_from(TINY).unwrap()).unwrap();
    }
    let mut socket = socket.connect(address).await.expect("a connection");
    let query = match kind {
        Kind::Reader => "events=task_available",
        Kind::Stuck => "codebases=filler",
    };
    let ask = format!(
        "GET /v1/worker/tasks/stream?worker_id={worker}&{query} HTTP/1.1\r\nHost: x\r\n\r\n"
    );
    socket.write_all(ask.as_bytes()).await.unwrap();
    socket
}

/// Reads to the end, and notes which beat came when.
async fn read(mut socket: TcpStream, heard: Option<Heard>) {
    let mut bytes = vec![0; TINY];
    let mut kept = 0;
    while let Ok(count @ 1..) = socket.read(&mut bytes[kept..]).await {
        let end = kept + count;
        let now = Instant::now();
        let mut rest = &bytes[..end];
        // Only in the announcement is the title followed by the codebase.
        while let Some(at) = find(rest, b"\"title\":\"beat ") {
            let Some(length) = find(&rest[at..], b"\",\"codebase_id\"") else {
                if find(&rest[at + 14..], b"\"").is_none() {
                    break;
                }
                rest = &rest[at + 14..];
                continue;
            };
            let number = std::str::from_utf8(&rest[at + 14..at + length]).ok();
            if let (Some(heard), Some(n)) = (&heard, number.and_then(|n| n.parse().ok())) {
                heard.lock().unwrap().push((n, now));
            }
            rest = &rest[at + length..];
        }
        let left = rest.len().min(200);
        let from = end - left;
        bytes.copy_within(from..end, 0);
        kept = left;
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// Clients whose packets do not arrive any more. Undone when dropped.
struct Unplugged(String);

impl Unplugged {
    fn new(ports: &[u16]) -> Option<Self> {
        let table = format!("taskwire_crowd_{}", std::process::id());
        let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
        let rules = format!(
            "table inet {table} {{\n set gone {{ type inet_service; elements = {{ {} }}\n }}\n chain in {{\n \
             type filter hook input priority 0;\n tcp sport @gone drop\n tcp dport @gone drop\n }}\n }}\n",
            ports.join(", ")
        );
        let done = Command::new("nft").arg(&rules).output().expect("nft runs");
        if done.status.success() {
            return Some(Self(table));
        }
        programs::skip(&format!("may not use nft: {}", String::from_utf8_lossy(&done.stderr)));
        None
    }
}

impl Drop for Unplugged {
    fn drop(&mut self) {
        let _ = Command::new("nft").args(["delete", "table", "inet", &self.0]).status();
    }
}
