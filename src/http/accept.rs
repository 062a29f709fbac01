//! The accept loop: sockets in, connections served, all of them gone at shutdown.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;

use crate::shutdown::{Shutdown, Stage};

/// A connection has this long to send its first request's head, and each further one's.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A silent peer is probed after this long, and so often, so many times.
const TCP_KEEPALIVE: Duration = Duration::from_secs(15);
const TCP_KEEPALIVE_PROBES: u32 = 3;
/// Wait after a failed accept, as when the process is out of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Serves until `drained`, so that a load balancer can ask `/readyz` while streams are ended; then
/// finishes the requests in flight. Ends at the latest when everything stops.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    drained: impl Future<Output = ()>,
    shutdown: Shutdown,
) {
    let graceful = GracefulShutdown::new();
    let mut drained = pin!(drained);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut drained => break,
            () = shutdown.reached(Stage::Stopping) => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, _)) => {
                if let Err(error) = tune(&socket) {
                    tracing::debug!("could not tune a socket, dropping it: {error}");
                    continue;
                }
                tokio::spawn(connection(socket, router.clone(), &graceful, shutdown.clone()));
            }
            Err(error) => {
                tracing::warn!("could not accept a connection: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
    drop(listener);
    let _ = shutdown.until_stopping(graceful.shutdown()).await;
}

/// One connection's life.
fn connection(
    socket: TcpStream,
    router: Router,
    graceful: &GracefulShutdown,
    shutdown: Shutdown,
) -> impl Future<Output = ()> + Send + 'static {
    let heard = Arc::new(AtomicBool::new(false));
    let has_asked = Arc::clone(&heard);
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let router = router.clone();
        has_asked.store(true, Ordering::Relaxed);
        async move {
            let response = router.oneshot(request.map(Body::new)).await;
            response.map_err(|never: Infallible| never)
        }
    });
    let watcher = graceful.watcher();
    async move {
        let mut builder = Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(TCP_KEEPALIVE)
            .keep_alive_timeout(TCP_KEEPALIVE);
        let serving = builder.serve_connection(TokioIo::new(socket), service);
        let mut serving = pin!(watcher.watch(serving.into_owned()));
        // hyper's own limit does not hold before it knows which HTTP is spoken, nor for HTTP/2.
        let serving = async {
            if let Ok(ended) = tokio::time::timeout(HEAD_TIMEOUT, &mut serving).await {
                return ended;
            }
            if !heard.load(Ordering::Relaxed) {
                return Err("no request came in time".into());
            }
            serving.await
        };
        if let Some(Err(error)) = shutdown.until_stopping(serving).await {
            tracing::debug!("a connection broke: {error}");
        }
    }
}

fn tune(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let options = SockRef::from(socket);
    options.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(TCP_KEEPALIVE)
            .with_interval(TCP_KEEPALIVE)
            .with_retries(TCP_KEEPALIVE_PROBES),
    )?;
    Ok(())
}
