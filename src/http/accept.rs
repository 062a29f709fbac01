//! The accept loop: sockets in, connections served, all of them gone at shutdown.

use std::fs::File;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::connection::{Served, serve_one};
use super::room::Room;
use super::socket::Socket;
use crate::shutdown::{Shutdown, Stage};

/// Wait after an accept that failed, also for want of descriptors although one was spare.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// Reads of what a refused client has sent already.
const REFUSED_READS_MAX: usize = 16;
/// What a connection hears for which there is no room; whole in one packet.
const NO_ROOM: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\n\
    content-type: application/problem+json\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 194\r\n\r\n\
    {\"type\":\"urn:taskwire:problem:too_many_connections\",\"title\":\"Too many connections\",\"status\":503,\
    \"code\":\"too_many_connections\",\"detail\":\"this replica has no room for more; try again in a moment\"}";

/// Serves until `drained`, so that a load balancer can ask `/readyz` while streams are ended; then
/// finishes the requests in flight. Ends at the latest when everything stops.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    room: Arc<Room>,
    drained: impl Future<Output = ()>,
    shutdown: Shutdown,
) {
    let (finish, finishing) = watch::channel(false);
    let served = Arc::new(Served { router, finishing, shutdown: shutdown.clone() });
    let mut drained = pin!(drained);
    let mut spare = Spare::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut drained => break,
            () = shutdown.reached(Stage::Stopping) => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((tcp, _)) => match room.enter() {
                Some(place) => match Socket::new(tcp) {
                    Ok(socket) => drop(tokio::spawn(serve_one(
                        socket,
                        place,
                        Arc::clone(&served),
                        room.head_timeout(),
                    ))),
                    Err(error) => tracing::debug!("could not tune a socket, dropping it: {error}"),
                },
                None => refuse(&tcp),
            },
            Err(error) if is_out_of_files(&error) => {
                tracing::debug!("out of file descriptors, refusing a connection");
                if !spare.refuse_one(&listener).await {
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
            // The peer was gone before it was accepted; or memory is short, and a moment helps.
            Err(error) => {
                tracing::debug!("could not accept a connection: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
    drop(listener);
    finish.send_replace(true);
    let _ = shutdown.until_stopping(room.is_empty()).await;
}

/// Says why, and closes. What the client has sent already is read: a socket that is closed with unread
/// bytes takes its last words back.
fn refuse(tcp: &TcpStream) {
    let _ = tcp.try_write(NO_ROOM);
    let _ = SockRef::from(tcp).shutdown(std::net::Shutdown::Write);
    let mut unread = [0; 4096];
    for _ in 0..REFUSED_READS_MAX {
        if !matches!(tcp.try_read(&mut unread), Ok(1..)) {
            break;
        }
    }
}

/// `EMFILE`, `ENFILE`: this process's limit of open files, or the machine's.
fn is_out_of_files(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// A descriptor to give up when there are no others: without one a connection could be neither taken nor
/// refused, and accepting would spin or stall.
struct Spare(Option<File>);

impl Spare {
    fn new() -> Self {
        Self(File::open("/dev/null").ok())
    }

    /// Takes the next connection and refuses it. Whether there was a descriptor for that.
    async fn refuse_one(&mut self, listener: &TcpListener) -> bool {
        if self.0.take().is_none() {
            *self = Self::new();
            return self.0.is_some();
        }
        // Somebody else may be faster to take what was given up.
        let accepted = tokio::time::timeout(ACCEPT_RETRY, listener.accept()).await;
        let refused = match accepted {
            Ok(Ok((tcp, _))) => {
                refuse(&tcp);
                true
            }
            Ok(Err(_)) => false,
            // Nobody is there any more.
            Err(_) => true,
        };
        *self = Self::new();
        refused
    }
}
