//! Many streams at once: opened, and told of something.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Failure;
use super::sse::{Event, Stream};

/// Streams that are opened at the same time.
const OPENING_MAX: usize = 64;
/// How long what was sent may take to reach every stream.
const HEAR_DEADLINE: Duration = Duration::from_mins(1);
/// Streams are listened to for so long before something is sent.
const CALM: Duration = Duration::from_millis(100);

/// Opens so many streams at the paths that `path` gives.
pub(super) async fn open(
    address: SocketAddr,
    count: usize,
    path: impl Fn(usize) -> String,
) -> io::Result<Vec<Stream>> {
    stream::iter((0..count).map(path))
        .map(|path| async move {
            let mut stream = Stream::open(address, &path).await?;
            let mut is_connected = false;
            while !is_connected {
                stream.read(|event| is_connected |= event.is("connected")).await?;
            }
            Ok(stream)
        })
        .buffer_unordered(OPENING_MAX)
        .try_collect()
        .await
}

/// Sends something, and waits until each stream has so many events that `counts`. How long the last one
/// took from the moment before it was sent, in seconds; and the streams.
pub(super) async fn tell(
    streams: Vec<Stream>,
    events: usize,
    counts: fn(Event<'_>) -> bool,
    send: impl Future<Output = Result<(), Failure>>,
) -> Result<(f64, Vec<Stream>), Failure> {
    let mut listening = JoinSet::new();
    let count = streams.len();
    for mut stream in streams {
        listening.spawn(async move {
            let mut heard = 0;
            while heard < events {
                stream.read(|event| heard += usize::from(counts(event))).await?;
            }
            Ok::<_, io::Error>((Instant::now(), stream))
        });
    }
    sleep(CALM).await;
    let begun = Instant::now();
    send.await?;
    let (mut last, mut streams) = (begun, Vec::with_capacity(count));
    let collect = async {
        while let Some(heard) = listening.join_next().await {
            let (at, stream) = heard??;
            last = last.max(at);
            streams.push(stream);
        }
        Ok::<_, Failure>(())
    };
    timeout(HEAR_DEADLINE, collect).await.map_err(|_| "not every stream heard of it in time")??;
    Ok((last.duration_since(begun).as_secs_f64(), streams))
}
