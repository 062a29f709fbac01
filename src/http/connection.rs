//! One connection's life: which HTTP it speaks, its deadlines, its end.
//!
//! A stream over HTTP/1 leaves here once its request is answered: its socket goes on alone
//! (see `stream_writer`), as hyper's buffers would be most of what an idle stream costs.

use std::convert::Infallible;
use std::error::Error;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::{Notify, watch};
use tower::ServiceExt;

use super::feed::Feed;
use super::in_flight::InFlight;
use super::request_body::RequestBody;
use super::room::Place;
use super::socket::Socket;
use super::stream_writer::{self, Taken};
use crate::shutdown::Shutdown;

/// Bytes of a request's head, at most: `X-Codebases` may list 500 ids of 128 characters.
const HEAD_BYTES_MAX: u32 = 128 * 1024;
/// A connection on which half a head has come has so long to send the rest when the replica shuts down.
const PARTIAL_HEAD_WAIT: Duration = Duration::from_secs(1);
/// An HTTP/2 connection without requests is looked at as often as a head may take, and closed after so many
/// looks: a minute.
const HTTP2_QUIET_LOOKS: u32 = 6;
/// Requests, streams among them, that one HTTP/2 connection may carry at the same time.
const HTTP2_STREAMS_MAX: u32 = 250;
/// Bytes that may wait for one of them.
const HTTP2_SEND_BYTES_MAX: usize = 64 * 1024;

/// What every connection needs.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) router: Router,
    /// True: finish what is in flight, and take no more. See [`Served::finishing`].
    pub(super) finishing: watch::Receiver<bool>,
    pub(super) shutdown: Shutdown,
}

impl Served {
    /// Once no more requests are to be taken.
    async fn finishing(&self) {
        // A sender that is gone has said so before.
        let _ = self.finishing.clone().wait_for(|now| *now).await;
    }
}

type Broken = Box<dyn Error + Send + Sync>;

/// Serves a connection to its end.
pub(super) async fn serve_one(
    socket: Socket,
    place: Place,
    served: Arc<Served>,
    head_timeout: Duration,
) {
    let shutdown = served.shutdown.clone();
    let serving = async {
        let is_http2 = tokio::select! {
            is_http2 = tokio::time::timeout(head_timeout, speaks_http2(&socket)) => is_http2,
            () = served.finishing() => return Ok(()),
        };
        if is_http2.map_err(|_| "nothing came in time")?? {
            over_http2(socket, place, &served, head_timeout).await
        } else {
            over_http1(socket, place, &served, head_timeout).await
        }
    };
    if let Some(Err(error)) = shutdown.until_stopping(serving).await {
        tracing::debug!("a connection broke: {error}");
    }
}

/// Whether it begins as HTTP/2 does (RFC 9113, section 3.4). No method of ours begins with these
/// letters; who sends less than three of them at once is taken to speak HTTP/1.
async fn speaks_http2(socket: &Socket) -> std::io::Result<bool> {
    let mut first = [0; 3];
    Ok(socket.peek(&mut first).await? == first.len() && first == *b"PRI")
}

async fn over_http1(
    socket: Socket,
    place: Place,
    served: &Served,
    head_timeout: Duration,
) -> Result<(), Broken> {
    let (handover, is_stuck) = (Arc::new(Handover::default()), socket.is_stuck());
    let in_flight = InFlight::default();
    let (router, to, counted) = (served.router.clone(), Arc::clone(&handover), in_flight.clone());
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, to, is_stuck) = (router.clone(), Arc::clone(&to), Arc::clone(&is_stuck));
        let answering = counted.begin();
        async move {
            let version = request.version();
            let mut response = answer(router, request).await;
            let Some(feed) = Feed::taken_from(&mut response) else {
                return Ok::<_, Infallible>(answering.with(response));
            };
            if is_stuck.load(Ordering::Relaxed) {
                // An earlier answer is still on its way out of hyper's buffer.
                return Ok(answering.with(response.map(|_| feed.into_body())));
            }
            let (head, _) = response.into_parts();
            to.put(Taken { head, version, feed });
            // This call is never answered through hyper.
            std::future::pending().await
        }
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .max_buf_size(HEAD_BYTES_MAX as usize)
        .serve_connection(TokioIo::new(socket), service);
    let taken = {
        let leaving = async {
            served.finishing().await;
            tokio::time::sleep(PARTIAL_HEAD_WAIT).await;
        };
        tokio::pin!(leaving);
        let (mut is_finishing, mut has_left) = (false, false);
        loop {
            tokio::select! {
                biased;
                taken = handover.taken() => break taken,
                ended = &mut connection => return Ok(ended?),
                () = served.finishing(), if !is_finishing => {
                    is_finishing = true;
                    Pin::new(&mut connection).graceful_shutdown();
                }
                // hyper would wait for the rest of a head of which a part has come.
                () = &mut leaving, if !has_left => {
                    has_left = true;
                    if in_flight.is_idle() {
                        return Ok(());
                    }
                }
            }
        }
    };
    let socket = connection.into_parts().io.into_inner();
    tokio::spawn(stream_writer::run(socket, place, taken));
    Ok(())
}

async fn over_http2(
    socket: Socket,
    _place: Place,
    served: &Served,
    head_timeout: Duration,
) -> Result<(), Broken> {
    let in_flight = InFlight::default();
    let (router, counted) = (served.router.clone(), in_flight.clone());
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, answering) = (router.clone(), counted.begin());
        async move {
            let mut response = answer(router, request).await;
            if let Some(feed) = Feed::taken_from(&mut response) {
                response = response.map(|_| feed.into_body());
            }
            Ok::<_, Infallible>(answering.with(response))
        }
    });
    // No pings: a worker that executes inside its read loop answers none, and is well. A peer that
    // vanished is noticed by TCP.
    let mut connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_header_list_size(HEAD_BYTES_MAX)
        .max_concurrent_streams(HTTP2_STREAMS_MAX)
        .max_send_buf_size(HTTP2_SEND_BYTES_MAX)
        .serve_connection(TokioIo::new(socket), service);
    let mut is_finishing = false;
    let mut look = tokio::time::interval(head_timeout);
    look.tick().await;
    let (mut seen, mut quiet_looks) = (0, 0);
    loop {
        tokio::select! {
            biased;
            ended = &mut connection => return Ok(ended?),
            () = served.finishing(), if !is_finishing => {
                is_finishing = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
            _ = look.tick() => {
                let ever = in_flight.ever();
                if ever == 0 {
                    return Err("no request came in time".into());
                }
                let is_quiet = in_flight.is_idle() && ever == seen;
                (seen, quiet_looks) = (ever, if is_quiet { quiet_looks + 1 } else { 0 });
                if quiet_looks == HTTP2_QUIET_LOOKS && !is_finishing {
                    is_finishing = true;
                    Pin::new(&mut connection).graceful_shutdown();
                }
            }
        }
    }
}

async fn answer(router: Router, request: Request<Incoming>) -> Response {
    let request = request.map(|body| Body::new(RequestBody::new(body)));
    router.oneshot(request).await.unwrap_or_else(|never: Infallible| match never {})
}

/// Where a stream's call leaves what its connection goes on with.
#[derive(Default)]
struct Handover {
    taken: Mutex<Option<Taken>>,
    is_there: Notify,
}

impl Handover {
    fn put(&self, taken: Taken) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = Some(taken);
        self.is_there.notify_one();
    }

    async fn taken(&self) -> Taken {
        loop {
            self.is_there.notified().await;
            if let Some(taken) = self.taken.lock().unwrap_or_else(PoisonError::into_inner).take() {
                return taken;
            }
        }
    }
}
