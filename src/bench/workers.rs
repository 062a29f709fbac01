//! Workers as they should be: one task at a time, and who is busy claims nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Semaphore;

use super::Failure;
use super::client::{Connection, number_after, post, post_into, text_after};
use super::sse::{Event, Stream};

/// How a worker comes by its tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// It hears of a task and claims it.
    Claims,
    /// The server claims so many for it, and pushes them.
    Slots(u32),
}

/// What workers did, and what keeps producers from running ahead of them.
#[derive(Debug)]
pub(super) struct Ledger {
    pub(super) completed: AtomicUsize,
    /// Claims that others had won.
    pub(super) refused: AtomicUsize,
    /// A permit for each task that may be created.
    pub(super) in_flight: Semaphore,
    in_flight_max: usize,
}

impl Ledger {
    pub(super) fn new(in_flight_max: usize) -> Arc<Self> {
        Arc::new(Self {
            completed: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            in_flight: Semaphore::new(in_flight_max),
            in_flight_max,
        })
    }

    fn complete(&self) {
        self.completed.fetch_add(1, Ordering::Relaxed);
        self.in_flight.add_permits(1);
    }
}

/// A task that is held.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) id: String,
    pub(super) epoch: i64,
}

impl Held {
    /// From the event of a slot.
    pub(super) fn of(event: Event<'_>) -> Option<Self> {
        if !event.is("task") {
            return None;
        }
        let epoch = number_after(event.data, r#""claim_epoch":"#).filter(|epoch| *epoch > 0)?;
        Some(Self { id: text_after(event.data, r#""id":""#)?.to_owned(), epoch })
    }

    /// From the answer to a claim of several.
    pub(super) fn all_of(answer: &[u8]) -> Vec<Self> {
        let starts: Vec<_> = memchr::memmem::find_iter(answer, br#"{"id":""#).collect();
        let ends = starts.iter().skip(1).copied().chain([answer.len()]);
        let parts = starts.iter().zip(ends).map(|(from, to)| &answer[*from..to]);
        let held = |part| {
            let id = text_after(part, r#""id":""#)?.to_owned();
            Some(Self { id, epoch: number_after(part, r#""claim_epoch":"#)? })
        };
        parts.filter_map(held).collect()
    }

    /// The request that completes it.
    pub(super) fn completion(&self, request: &mut Vec<u8>, worker: &str) {
        let body = format!(r#"{{"worker_id":"{worker}","claim_epoch":{}}}"#, self.epoch);
        post_into(request, &format!("/v1/tasks/{}/complete", self.id), &body);
    }
}

/// The path of a worker's stream.
pub(super) fn stream_path(worker: &str, codebase: &str, way: Way) -> String {
    let path = format!("/v1/worker/tasks/stream?worker_id={worker}&codebases={codebase}");
    match way {
        Way::Claims => format!("{path}&events=task_available"),
        Way::Slots(slots) => format!("{path}&slots={slots}"),
    }
}

/// One worker with a stream that is open already, until the stream ends or something goes wrong.
pub(super) async fn work(
    address: SocketAddr,
    stream: Stream,
    name: String,
    way: Way,
    ledger: Arc<Ledger>,
) -> Result<(), Failure> {
    let connection = Connection::open(address).await?;
    match way {
        Way::Claims => claim_and_complete(stream, connection, &name, &ledger).await,
        Way::Slots(_) => complete(stream, connection, &name, &ledger).await,
    }
}

/// Among what it heard last it chooses at random: a fleet whose workers all choose alike would race for
/// each task.
async fn claim_and_complete(
    mut stream: Stream,
    mut connection: Connection,
    name: &str,
    ledger: &Ledger,
) -> Result<(), Failure> {
    let claim = format!(r#"{{"worker_id":"{name}"}}"#);
    let (mut heard, mut request) = (Vec::new(), Vec::new());
    loop {
        stream.read_ready(|event| heard.extend(announced(event)))?;
        if heard.is_empty() {
            stream.read(|event| heard.extend(announced(event))).await?;
            if heard.is_empty() {
                continue;
            }
        }
        // There are no more than so many: what was heard before is done.
        let stale = heard.len().saturating_sub(ledger.in_flight_max);
        heard.drain(..stale);
        let id = heard.swap_remove(rand::random_range(0..heard.len()));
        post_into(&mut request, &format!("/v1/tasks/{id}/claim"), &claim);
        let answer = connection.call(&request).await?;
        if answer.status == 409 {
            ledger.refused.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        answer.expect(200)?;
        let epoch = number_after(answer.body, r#""claim_epoch":"#).unwrap_or_default();
        Held { id, epoch }.completion(&mut request, name);
        connection.call(&request).await?.expect(200)?;
        ledger.complete();
    }
}

fn announced(event: Event<'_>) -> Option<String> {
    let id = text_after(event.data, r#""task_id":""#)?;
    event.is("task_available").then(|| id.to_owned())
}

async fn complete(
    mut stream: Stream,
    mut connection: Connection,
    name: &str,
    ledger: &Ledger,
) -> Result<(), Failure> {
    let (mut held, mut request) = (Vec::new(), Vec::new());
    loop {
        stream.read(|event| held.extend(Held::of(event))).await?;
        for task in held.drain(..) {
            task.completion(&mut request, name);
            connection.call(&request).await?.expect(200)?;
            ledger.complete();
        }
    }
}

/// Creates tasks of these codebases in turn, as fast as the ledger lets it.
pub(super) async fn produce(
    address: SocketAddr,
    codebases: Vec<String>,
    ledger: Arc<Ledger>,
) -> Result<(), Failure> {
    let mut connection = Connection::open(address).await?;
    let request = |codebase: &String| {
        post("/v1/tasks", &format!(r#"{{"title":"bench","codebase_id":"{codebase}"}}"#))
    };
    let requests: Vec<_> = codebases.iter().map(request).collect();
    for request in requests.iter().cycle() {
        ledger.in_flight.acquire().await?.forget();
        connection.call(request).await?.expect(201)?;
    }
    Ok(())
}
