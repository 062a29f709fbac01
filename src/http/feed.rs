//! What one stream's connection is fed with: what its mailbox holds, and a keepalive when that was
//! nothing for a while. Whoever writes it to a socket, this is where it comes from.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::CONTENT_LENGTH;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body::Frame;
use tokio::time::{Instant, Sleep};

use super::room::StreamPlace;
use super::stream::stream_headers;
use crate::push::frames::End;
use crate::push::hub::Hub;
use crate::push::stream::Stream;

/// A stream's frames. The stream ends when this is dropped.
pub(super) struct Feed {
    stream: Arc<Stream>,
    hub: Arc<Hub>,
    keepalive: Duration,
    silence: Pin<Box<Sleep>>,
    _place: StreamPlace,
}

/// A feed on its way from the handler to the connection: extensions of a response must be `Clone`.
#[derive(Clone)]
struct Carried(Arc<Mutex<Option<Feed>>>);

impl Feed {
    pub(super) fn new(
        stream: Arc<Stream>,
        hub: Arc<Hub>,
        keepalive: Duration,
        place: StreamPlace,
    ) -> Self {
        let silence = Box::pin(tokio::time::sleep(keepalive));
        Self { stream, hub, keepalive, silence, _place: place }
    }

    /// The answer that begins the stream. Its connection decides how the rest is written.
    pub(super) fn into_response(self) -> Response {
        let mut response = stream_headers().into_response();
        response.extensions_mut().insert(Carried(Arc::new(Mutex::new(Some(self)))));
        response
    }

    /// The feed that an answer begins, if it does.
    pub(super) fn taken_from(response: &mut Response) -> Option<Self> {
        let carried = response.extensions_mut().remove::<Carried>()?;
        // Of the answer without its body.
        response.headers_mut().remove(CONTENT_LENGTH);
        carried.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The next frame; `None` after the last one. Whoever takes frames says when they have left.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let frame = match self.stream.mailbox.poll_take(context) {
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Ready(Some(frame)) => {
                if self.stream.mailbox.wants_refill() {
                    self.hub.refill_one(self.stream.connection_id);
                }
                frame
            }
            Poll::Pending => {
                // Who has not read for hours gets none: even those would fill its socket.
                loop {
                    if self.silence.as_mut().poll(context).is_pending() {
                        return Poll::Pending;
                    }
                    if let Some(frame) = self.stream.keepalive() {
                        break frame;
                    }
                    let next = Instant::now() + self.keepalive;
                    self.silence.as_mut().reset(next);
                }
            }
        };
        let next = Instant::now() + self.keepalive;
        self.silence.as_mut().reset(next);
        Poll::Ready(Some(frame))
    }

    /// How many frames were taken, if somebody wants to know when they have left.
    pub(super) fn taken(&self) -> Option<u64> {
        self.stream.has_slots.then(|| self.stream.mailbox.taken())
    }

    /// Of the frames that were taken, so many have left.
    pub(super) fn has_left(&self, frames: u64) {
        self.stream.has_left(frames);
    }

    /// The peer takes nothing any more.
    pub(super) fn is_stuck(&self) {
        tracing::info!(
            target: "worker_sse", worker_id = %self.stream.worker_id,
            connection_id = %self.stream.connection_id, "stream ended: its peer takes nothing"
        );
        self.hub.end(&self.stream, End::TooSlow);
    }

    /// As the body of an answer that hyper writes.
    pub(super) fn into_body(self) -> Body {
        Body::new(FeedBody(self))
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.hub.unsubscribe(&self.stream);
        tracing::info!(
            target: "worker_sse", worker_id = %self.stream.worker_id,
            connection_id = %self.stream.connection_id, "stream closed"
        );
    }
}

struct FeedBody(Feed);

impl http_body::Body for FeedBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let next = self.0.poll_next(context);
        // It is hyper's now, and counts as gone.
        if let Some(taken) = self.0.taken() {
            self.0.has_left(taken);
        }
        next.map(|frame| frame.map(|frame| Ok(Frame::data(frame))))
    }
}
