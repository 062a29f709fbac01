//! A socket that gives up on a peer that takes nothing.
//!
//! The deadline lives here, under HTTP: a body is not asked for more while its socket is full, so a
//! deadline inside it would never be looked at.

use std::io;
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// A peer that takes no byte for so long while there are some for it is broken (protocol S8).
pub(super) const WRITE_PROGRESS_WITHIN: Duration = Duration::from_secs(20);
/// A silent peer is probed after so many seconds, each after another time: thousands that came at once would be probed
/// at once, the kernel's queue for packets to this machine itself holds a thousand, and two lost probes are the
/// end of a connection.
const KEEPALIVE_AFTER: RangeInclusive<u64> = 6..=10;
/// And then this often. One that never answers is given up by `TCP_USER_TIMEOUT`, 20 to 25 s after
/// its last sign of life.
const KEEPALIVE_EVERY: RangeInclusive<u64> = 4..=6;

/// A connection to a client.
#[derive(Debug)]
pub(super) struct Socket {
    tcp: TcpStream,
    /// Runs while the peer takes nothing. Boxed: most sockets never need it.
    patience: Option<Pin<Box<Sleep>>>,
    is_stuck: Arc<AtomicBool>,
}

impl Socket {
    /// Sets the options that every accepted socket has.
    pub(super) fn new(tcp: TcpStream) -> io::Result<Self> {
        tcp.set_nodelay(true)?;
        let options = SockRef::from(&tcp);
        let seconds = |range| Duration::from_secs(rand::random_range(range));
        let keepalive = TcpKeepalive::new()
            .with_time(seconds(KEEPALIVE_AFTER))
            .with_interval(seconds(KEEPALIVE_EVERY));
        options.set_tcp_keepalive(&keepalive)?;
        // The kernel's own: also for what it has taken from us and the peer has not acknowledged, or has
        // no room for. Without it a vanished peer is noticed after a quarter of an hour.
        #[cfg(target_os = "linux")]
        options.set_tcp_user_timeout(Some(WRITE_PROGRESS_WITHIN))?;
        Ok(Self { tcp, patience: None, is_stuck: Arc::default() })
    }

    /// Whether the last write found no room.
    pub(super) fn is_stuck(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.is_stuck)
    }

    /// The first bytes that the peer sends, which stay unread; none: it is gone.
    pub(super) async fn peek(&self, bytes: &mut [u8]) -> io::Result<usize> {
        self.tcp.peek(bytes).await
    }

    fn progress<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            if self.patience.take().is_some() {
                self.is_stuck.store(false, Ordering::Relaxed);
            }
            return written;
        }
        let patience = self.patience.get_or_insert_with(|| {
            self.is_stuck.store(true, Ordering::Relaxed);
            Box::pin(tokio::time::sleep(WRITE_PROGRESS_WITHIN))
        });
        match patience.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(context, into)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tcp).poll_write(context, bytes);
        self.progress(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tcp).poll_write_vectored(context, slices);
        self.progress(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }
}
