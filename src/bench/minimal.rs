//! The least that axum can do: answer a call, and send one shared frame to every stream. It is what the
//! figures of HTTP are compared with, measured by the same client.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream;
use tokio::net::TcpListener;
use tokio::sync::broadcast;

/// Frames that a slow stream may be behind; one that is further behind loses some.
const BEHIND_MAX: usize = 4_096;

type Frames = Arc<broadcast::Sender<Bytes>>;

/// Serves on a free port until the process ends.
pub(super) async fn serve() -> io::Result<()> {
    let frames: Frames = Arc::new(broadcast::channel(BEHIND_MAX).0);
    let router = Router::new()
        .route("/hello", post(hello))
        .route("/stream", get(open))
        .route("/frames/{count}", post(send))
        .route("/frames-at-once/{count}", post(send_at_once))
        .with_state(frames);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    super::print(&format!("serves on http://{}", listener.local_addr()?));
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let service = hyper_util::service::TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let socket = hyper_util::rt::TokioIo::new(socket);
            let _ =
                hyper::server::conn::http1::Builder::new().serve_connection(socket, service).await;
        });
    }
}

async fn hello(body: Bytes) -> Response {
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

/// A stream of frames from now on, after a first one that says so.
async fn open(State(frames): State<Frames>) -> Response {
    let receiver = frames.subscribe();
    let first = Some(Bytes::from_static(b"event: connected\ndata: {}\n\n"));
    let frames = stream::unfold((first, receiver), async |(first, mut receiver)| {
        if let Some(first) = first {
            return Some((Ok::<_, Infallible>(first), (None, receiver)));
        }
        loop {
            match receiver.recv().await {
                Ok(frame) => return Some((Ok(frame), (None, receiver))),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    });
    ([(CONTENT_TYPE, "text/event-stream")], Body::from_stream(frames)).into_response()
}

/// Sends the body to every stream, so many times. Streams that can write do so in between.
async fn send(State(frames): State<Frames>, Path(count): Path<usize>, body: Bytes) {
    for _ in 0..count.min(BEHIND_MAX) {
        let _ = frames.send(body.clone());
        tokio::task::yield_now().await;
    }
}

/// The same without a pause: each stream finds all of it when it comes to write.
async fn send_at_once(State(frames): State<Frames>, Path(count): Path<usize>, body: Bytes) {
    for _ in 0..count.min(BEHIND_MAX) {
        let _ = frames.send(body.clone());
    }
}
