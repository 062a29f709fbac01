//! How many requests of one connection are being answered.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http_body::{Frame, SizeHint};

/// The count. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct InFlight(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    now: AtomicUsize,
    ever: AtomicUsize,
}

/// A request that is being answered, up to the last byte of its body.
pub(super) struct Answering(InFlight);

impl InFlight {
    pub(super) fn begin(&self) -> Answering {
        self.0.now.fetch_add(1, Ordering::Relaxed);
        self.0.ever.fetch_add(1, Ordering::Relaxed);
        Answering(self.clone())
    }

    /// Whether nothing is being answered.
    pub(super) fn is_idle(&self) -> bool {
        self.0.now.load(Ordering::Relaxed) == 0
    }

    /// How many requests there have been.
    pub(super) fn ever(&self) -> usize {
        self.0.ever.load(Ordering::Relaxed)
    }
}

impl Answering {
    /// Goes on until the body of the answer is gone.
    pub(super) fn with(self, response: Response) -> Response {
        response.map(|body| Body::new(AnswerBody { body, _answering: self }))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

struct AnswerBody {
    body: Body,
    _answering: Answering,
}

impl http_body::Body for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
