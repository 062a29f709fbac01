//! Closed-loop load: each connection sends its next request when the last one was answered. What it
//! measures is throughput; its latencies say nothing of what a client that does not wait would see.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Failure;
use super::client::{Connection, post, post_into, text_after};
use super::figures::Latencies;

/// How much longer than it should a run may take.
const GRACE: Duration = Duration::from_secs(30);

/// What a run did.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) calls: usize,
    pub(super) seconds: f64,
    pub(super) latencies: Latencies,
}

impl Done {
    pub(super) fn per_second(&self) -> f64 {
        self.calls as f64 / self.seconds
    }
}

/// Sends requests over so many connections, spread over the servers, for so long or until none is left.
/// `requests` gives each connection its source: it fills a buffer with the next one, or says that there is
/// none. Every answer must have the status.
pub(super) async fn closed_loop<Source>(
    addresses: &[SocketAddr],
    connections: usize,
    length: Duration,
    status: u16,
    requests: impl Fn(usize) -> Source,
) -> Result<Done, Failure>
where
    Source: FnMut(&mut Vec<u8>) -> bool + Send + 'static,
{
    let start = Arc::new(Barrier::new(connections));
    let mut running = JoinSet::new();
    for (number, address) in addresses.iter().copied().cycle().take(connections).enumerate() {
        let (start, mut next) = (Arc::clone(&start), requests(number));
        running.spawn(async move {
            let connection = Connection::open(address).await;
            start.wait().await;
            let mut connection = connection?;
            let (begun, mut request, mut latencies) = (Instant::now(), Vec::new(), Vec::new());
            while begun.elapsed() < length && next(&mut request) {
                let sent = Instant::now();
                connection.call(&request).await?.expect(status)?;
                latencies.push(sent.elapsed());
            }
            Ok((begun, Instant::now(), latencies))
        });
    }
    collect(running, length).await
}

type Ended = io::Result<(Instant, Instant, Vec<Duration>)>;

async fn collect(mut running: JoinSet<Ended>, length: Duration) -> Result<Done, Failure> {
    let collect = async {
        let (mut span, mut all) = (None, Vec::new());
        while let Some(ended) = running.join_next().await {
            let (begun, end, latencies) = ended??;
            let (first, last) = span.unwrap_or((begun, end));
            span = Some((begun.min(first), end.max(last)));
            all.extend(latencies);
        }
        let seconds = span.map_or(0.0, |(begun, end)| end.duration_since(begun).as_secs_f64());
        Ok(Done { calls: all.len(), seconds, latencies: Latencies::new(all) })
    };
    timeout(length + GRACE, collect).await.map_err(|_| "the load did not end in time")?
}

/// The same request for ever.
pub(super) fn repeat(request: &[u8]) -> impl FnMut(&mut Vec<u8>) -> bool + Send + use<> {
    let request = request.to_vec();
    move |next| {
        if next.is_empty() {
            next.extend_from_slice(&request);
        }
        true
    }
}

/// Create, claim, complete, and again, over so many connections; no streams. A call is a whole life.
pub(super) async fn lives(
    address: SocketAddr,
    connections: usize,
    length: Duration,
) -> Result<Done, Failure> {
    let create = post("/v1/tasks", r#"{"title":"bench","codebase_id":"bench"}"#);
    let mut running = JoinSet::new();
    for _ in 0..connections {
        let create = create.clone();
        running.spawn(async move {
            let mut connection = Connection::open(address).await?;
            let (begun, mut request, mut latencies) = (Instant::now(), Vec::new(), Vec::new());
            while begun.elapsed() < length {
                let sent = Instant::now();
                let answer = connection.call(&create).await?;
                answer.expect(201)?;
                let id = text_after(answer.body, r#""id":""#).unwrap_or_default().to_owned();
                for verb in ["claim", "complete"] {
                    let path = format!("/v1/tasks/{id}/{verb}");
                    post_into(&mut request, &path, r#"{"worker_id":"bench-worker"}"#);
                    connection.call(&request).await?.expect(200)?;
                }
                latencies.push(sent.elapsed());
            }
            Ok((begun, Instant::now(), latencies))
        });
    }
    collect(running, length).await
}
