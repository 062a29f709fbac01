//! A request's body that has to keep coming.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Sleep;

/// A body of which nothing came for so long is given up.
pub(super) const BODY_SILENCE_MAX: Duration = Duration::from_secs(10);

/// The body, and how long it has been silent.
pub(super) struct RequestBody {
    incoming: Incoming,
    patience: Option<Pin<Box<Sleep>>>,
}

impl RequestBody {
    pub(super) fn new(incoming: Incoming) -> Self {
        Self { incoming, patience: None }
    }
}

/// Why a body was given up.
#[derive(Debug)]
pub(super) enum BodyError {
    Broken(hyper::Error),
    Silent,
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broken(_) => f.write_str("the body broke off"),
            Self::Silent => {
                write!(f, "nothing of the body came for {} s", BODY_SILENCE_MAX.as_secs())
            }
        }
    }
}

impl std::error::Error for BodyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Broken(error) => Some(error),
            Self::Silent => None,
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let next = Pin::new(&mut self.incoming).poll_frame(context);
        if let Poll::Ready(next) = next {
            self.patience = None;
            return Poll::Ready(next.map(|frame| frame.map_err(BodyError::Broken)));
        }
        let patience =
            self.patience.get_or_insert_with(|| Box::pin(tokio::time::sleep(BODY_SILENCE_MAX)));
        patience.as_mut().poll(context).map(|()| Some(Err(BodyError::Silent)))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
