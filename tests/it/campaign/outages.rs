//! Postgres goes away in every way it can, and what users are promised meanwhile (P10): writes are
//! refused soon, streams stay, and everything works again soon after.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rand::rngs::StdRng;
use serde_json::json;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Executor};
use tokio::time::{sleep, timeout};

use super::cluster::Stop;
use super::faults::{World, between, killed};
use super::fleet::Slot;
use super::larger::More;
use super::producers::ATTEMPTS;
use super::weather::shares;
use crate::support::SseStream;

/// Postgres is back by then, or the campaign cannot go on.
const BACK_WITHIN: Duration = Duration::from_mins(3);
/// A write without Postgres is refused within a second (E3); the rest is for the machine.
const REFUSED_WITHIN: Duration = Duration::from_secs(3);
/// P10 says 5 s; the rest is for the machine.
const RECOVERED_WITHIN: Duration = Duration::from_secs(10);
/// With other faults at the same time a replica may take longer, but not for ever.
const RECOVERED_AT_ALL: Duration = Duration::from_secs(90);

/// What outages have shown so far.
#[derive(Default)]
pub struct Outages(Mutex<Shown>);

#[derive(Default)]
struct Shown {
    count: usize,
    away: Vec<Duration>,
    /// How long a write took to be refused.
    refused: Vec<Duration>,
    /// From Postgres' return to the first create and claim, by replica: alone, and among other faults.
    recovered: [Vec<Duration>; 2],
    streams: usize,
}

impl Outages {
    pub fn figures(&self) -> String {
        let Shown { count, away, refused, recovered: [alone, among], streams } =
            &mut *self.0.lock().unwrap();
        format!(
            "{count} outages, Postgres away {}\n  writes meanwhile refused within {}\n  \
             create and claim again after {}\n  the same among other faults {}\n  \
             {streams} streams watched through an outage, all stayed open",
            shares(away),
            shares(refused),
            shares(alone),
            shares(among),
        )
    }
}

/// A stream that must outlive an outage, and the process that serves it.
struct Onlooker {
    stream: SseStream,
    pid: u32,
}

impl World {
    pub async fn postgres_stops(&self, more: &More, how: Stop, away: Duration) {
        let _one_at_a_time = more.outage.lock().await;
        let alone = more.weather.single();
        let onlookers = join_all(self.fleet.slots.iter().enumerate().map(|(n, slot)| {
            let query = format!("worker_id=onlooker-{n}&codebases=nobody");
            async move {
                let (url, pid) = slot.at()?;
                let stream = SseStream::try_open(&more.streams, &url, &query).await?;
                Some(Onlooker { stream, pid })
            }
        }))
        .await;
        if !more.cluster.stop(how, away) {
            return;
        }
        let begun = Instant::now();
        while more.cluster.accepts().await && begun.elapsed() < Duration::from_secs(5) {
            sleep(Duration::from_millis(20)).await;
        }
        let down = Instant::now();
        if away > Duration::from_millis(700) {
            self.writes_are_refused(more, alone).await;
        }
        while !more.cluster.accepts().await {
            assert!(down.elapsed() < away + BACK_WITHIN, "Postgres does not come back");
            sleep(Duration::from_millis(20)).await;
        }
        {
            let mut shown = more.outages.0.lock().unwrap();
            shown.count += 1;
            shown.away.push(down.elapsed());
        }
        let recoveries = self.fleet.slots.iter().map(|slot| self.recovers(more, slot));
        let recoveries = join_all(recoveries).await;
        let is_alone = alone.is_some() && alone == more.weather.single();
        for recovery in recoveries.into_iter().flatten() {
            more.outages.0.lock().unwrap().recovered[usize::from(!is_alone)].push(recovery);
            if is_alone && recovery > RECOVERED_WITHIN {
                more.ledger.violation(format!("works only {recovery:?} after Postgres (P10)"));
            }
        }
        for (slot, onlooker) in self.fleet.slots.iter().zip(onlookers) {
            let Some(Onlooker { mut stream, pid }) = onlooker else { continue };
            let ended = async { while stream.read().await.is_some() {} };
            let has_ended = timeout(Duration::from_millis(50), ended).await.is_ok();
            if alone.is_none()
                || alone != more.weather.single()
                || slot.at().is_none_or(|at| at.1 != pid)
            {
                continue;
            }
            more.outages.0.lock().unwrap().streams += 1;
            if has_ended {
                more.ledger.violation("a stream ended in an outage (E3)".to_owned());
            }
        }
    }

    /// While Postgres is away: each replica says so, soon.
    async fn writes_are_refused(&self, more: &More, alone: Option<usize>) {
        let asked = self.fleet.slots.iter().map(|slot| async move {
            let (url, _) = slot.at()?;
            let begun = Instant::now();
            let status = more.create(&url).await;
            Some((status, begun.elapsed()))
        });
        for (status, took) in join_all(asked).await.into_iter().flatten() {
            let is_alone = alone.is_some() && alone == more.weather.single();
            if status == Some(503) {
                more.outages.0.lock().unwrap().refused.push(took);
            }
            if is_alone && (status.is_none() || took > REFUSED_WITHIN) {
                more.ledger.violation(format!("a write got {status:?} after {took:?} (P10)"));
            }
        }
    }

    /// How long it takes until a replica creates and claims; `None` if it was replaced meanwhile.
    async fn recovers(&self, more: &More, slot: &Slot) -> Option<Duration> {
        let (url, pid) = slot.at()?;
        let back = Instant::now();
        let me = json!({"worker_id": "medic", "name": "medic"});
        let any = json!({"worker_id": "medic", "n": 1});
        let mut tries = Vec::new();
        loop {
            let begun = back.elapsed();
            let statuses = [
                more.create(&url).await,
                more.post(&url, "/v1/agent/workers/register", &me).await,
                more.post(&url, "/v1/tasks/claim", &any).await,
            ];
            tries.push((begun, statuses, more.weather.active()));
            if statuses.iter().flatten().filter(|status| **status < 300).count() == 3 {
                if back.elapsed() > RECOVERED_WITHIN {
                    let last: Vec<_> = tries.iter().rev().take(15).collect();
                    eprintln!("{url} works again after {:?}, pid {pid}: {last:?}", back.elapsed());
                }
                return Some(back.elapsed());
            }
            if slot.at().is_none_or(|at| at.1 != pid) {
                return None;
            }
            if back.elapsed() > RECOVERED_AT_ALL {
                more.ledger.violation(format!("{url} does not work again (P10)"));
                return None;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Every connection that Postgres has is taken: those that replicas lose, too.
    pub async fn connections_used_up(&self, more: &More, during: Duration) {
        let options: PgConnectOptions = more.cluster.server_url.parse().unwrap();
        let options = options.disable_statement_logging();
        self.operate(&killed("like 'taskwire%'")).await;
        let (begun, mut held) = (Instant::now(), Vec::new());
        while begun.elapsed() < during {
            match timeout(Duration::from_secs(1), options.connect()).await {
                Ok(Ok(connection)) => held.push(connection),
                _ => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// The listeners are gone and cannot come back; statements go on over the connections there are.
    pub async fn logins_refused(&self, during: Duration) {
        self.operate("alter role server nologin").await;
        self.operate(&killed("= 'taskwire listener'")).await;
        sleep(during).await;
        self.insist("alter role server login").await;
    }

    /// A foreign session that listens on our channel, never reads, and keeps a transaction open.
    pub async fn deaf_listener(&self, more: &More, during: Duration) {
        let options: PgConnectOptions = more.cluster.server_url.parse().unwrap();
        let Ok(mut deaf) = options.disable_statement_logging().connect().await else { return };
        let listens = "listen taskwire; begin; select pg_current_xact_id()";
        if deaf.execute(sqlx::raw_sql(listens)).await.is_ok() {
            sleep(during).await;
        }
    }

    /// Rows that are nobody's, in one statement, and away again in one.
    pub async fn many_rows(&self, rows: usize, rng: &mut StdRng) {
        let insert = format!(
            "insert into tasks (title, codebase_id) select 'foreign', 'foreign' from generate_series(1, {rows})"
        );
        self.operate(&insert).await;
        sleep(between(rng, 0, 1_000)).await;
        self.insist("delete from tasks where codebase_id = 'foreign'").await;
    }
}

impl More {
    /// A task made at one replica, with a note of what became of it. Its status, if there was an answer.
    pub async fn create(&self, url: &str) -> Option<u16> {
        let title = format!("probe-{}", uuid::Uuid::new_v4());
        let body = json!({"title": title, "codebase_id": "group-1", "max_attempts": ATTEMPTS});
        self.create_task(url, &title, &body).await
    }

    pub async fn create_task(
        &self,
        url: &str,
        title: &str,
        body: &serde_json::Value,
    ) -> Option<u16> {
        let sent = self.http.post(format!("{url}/v1/tasks")).json(body).send();
        let answer = async {
            let response = sent.await.ok()?;
            Some((response.status().as_u16(), response.json::<serde_json::Value>().await.ok()?))
        };
        let answer = answer.await;
        match &answer {
            Some((201, task)) => {
                self.ledger.created(task["id"].as_str().unwrap_or_default(), title);
            }
            // It may be there or not.
            _ => self.ledger.batch_unanswered(title, 1),
        }
        let status = answer.map(|(status, _)| status);
        if status.is_some_and(|status| !matches!(status, 201 | 408 | 503)) {
            self.ledger.violation(format!("a create got {status:?}"));
        }
        status
    }

    pub async fn post(&self, url: &str, path: &str, body: &serde_json::Value) -> Option<u16> {
        let answer = self.http.post(format!("{url}{path}")).json(body).send().await.ok()?;
        Some(answer.status().as_u16())
    }
}
