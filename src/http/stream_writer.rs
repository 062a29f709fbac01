//! A stream's socket over HTTP/1, after its request: writes the answer's head and then its frames, and
//! nothing else stands between the mailbox and the socket.
//!
//! hyper would keep 8 KiB of read buffer and its own state for each idle stream.

use std::future::poll_fn;
use std::io::{self, Write};
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use axum::http::Version;
use axum::http::response::Parts;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};

use super::feed::Feed;
use super::room::Place;
use super::socket::Socket;

/// Bytes that go out in one write, about.
const WRITE_BYTES_MAX: usize = 32 * 1024;
/// What a client sends after its request means nothing; so much of it is thrown away.
const UNASKED_BYTES_MAX: usize = 16 * 1024;
/// How long the client has to close after the last byte, so that none is lost to a reset.
const FAREWELL_WAIT: Duration = Duration::from_secs(1);

/// What a connection goes on with after a stream's request.
pub(super) struct Taken {
    pub(super) head: Parts,
    pub(super) version: Version,
    pub(super) feed: Feed,
}

/// How it goes on.
enum Next {
    Write,
    /// The last frame is in what is to be written.
    Last,
    /// The client hung up.
    Gone,
}

/// Writes a stream until either side ends it.
pub(super) async fn run(mut socket: Socket, place: Place, taken: Taken) {
    let Taken { head, version, mut feed } = taken;
    // An older client, such as nginx by default, reads until the connection ends.
    let is_chunked = version == Version::HTTP_11;
    let mut out = Out { bytes: encode_head(&head, is_chunked), is_chunked, ends: Vec::new() };
    drop(head);
    let mut unasked = 0;
    let ended = loop {
        if let Err(error) = out.write(&mut socket, &feed).await {
            break Err(error);
        }
        match next(&mut socket, &mut feed, &mut out, &mut unasked).await {
            Ok(Next::Write) => {}
            Ok(Next::Last) => break out.write(&mut socket, &feed).await,
            Ok(Next::Gone) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    match ended {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => feed.is_stuck(),
        Err(error) => tracing::debug!("a stream's connection broke: {error}"),
        Ok(()) => {
            drop(feed);
            let _ = tokio::time::timeout(FAREWELL_WAIT, farewell(&mut socket)).await;
        }
    }
    drop(place);
}

/// What is to be written.
struct Out {
    bytes: Vec<u8>,
    is_chunked: bool,
    /// Where frames end in it, and how many have left then. Only kept where somebody wants to know.
    ends: Vec<(usize, u64)>,
}

impl Out {
    fn add(&mut self, frame: &[u8], taken: Option<u64>) {
        encode_frame(&mut self.bytes, frame, self.is_chunked);
        if let Some(taken) = taken {
            self.ends.push((self.bytes.len(), taken));
        }
    }

    /// Writes all of it, and says which frames have left, also when that fails half way.
    async fn write(&mut self, socket: &mut Socket, feed: &Feed) -> io::Result<()> {
        let mut written = 0;
        let result = loop {
            if written == self.bytes.len() {
                break Ok(());
            }
            match socket.write(&self.bytes[written..]).await {
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => written += count,
                Err(error) => break Err(error),
            }
        };
        if let Some((_, taken)) = self.ends.iter().rev().find(|(end, _)| *end <= written) {
            feed.has_left(*taken);
        }
        // An idle stream keeps no buffer.
        (self.bytes, self.ends) = (Vec::new(), Vec::new());
        result
    }
}

/// Gathers what there is to write; waits for something, or for the client to hang up.
async fn next(
    socket: &mut Socket,
    feed: &mut Feed,
    out: &mut Out,
    unasked: &mut usize,
) -> io::Result<Next> {
    poll_fn(|context| {
        while out.bytes.len() < WRITE_BYTES_MAX {
            match feed.poll_next(context) {
                Poll::Ready(Some(frame)) => out.add(&frame, feed.taken()),
                Poll::Ready(None) => {
                    if out.is_chunked {
                        out.bytes.extend_from_slice(b"0\r\n\r\n");
                    }
                    return Poll::Ready(Ok(Next::Last));
                }
                Poll::Pending => break,
            }
        }
        if !out.bytes.is_empty() {
            return Poll::Ready(Ok(Next::Write));
        }
        let mut bytes = [0; 256];
        loop {
            let mut read = ReadBuf::new(&mut bytes);
            match Pin::new(&mut *socket).poll_read(context, &mut read) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(())) => {}
            }
            *unasked += read.filled().len();
            if read.filled().is_empty() || *unasked > UNASKED_BYTES_MAX {
                return Poll::Ready(Ok(Next::Gone));
            }
        }
    })
    .await
}

/// RFC 9112: status line, header fields, and how the end will be known.
fn encode_head(head: &Parts, is_chunked: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    let reason = head.status.canonical_reason().unwrap_or_default();
    // Writing into a Vec cannot fail.
    let _ = write!(out, "HTTP/1.1 {} {reason}\r\n", head.status.as_u16());
    for (name, value) in &head.headers {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            out.extend_from_slice(part);
        }
    }
    let _ = write!(out, "date: {}\r\n", httpdate::fmt_http_date(SystemTime::now()));
    let framing = if is_chunked { "transfer-encoding: chunked\r\n" } else { "" };
    let _ = write!(out, "connection: close\r\n{framing}\r\n");
    out
}

/// RFC 9112, section 7.1: a chunk.
fn encode_frame(out: &mut Vec<u8>, frame: &[u8], is_chunked: bool) {
    out.reserve(frame.len() + 16);
    if is_chunked {
        let _ = write!(out, "{:x}\r\n", frame.len());
    }
    out.extend_from_slice(frame);
    if is_chunked {
        out.extend_from_slice(b"\r\n");
    }
}

/// Says that nothing follows, and reads until the client has closed.
async fn farewell(socket: &mut Socket) -> io::Result<()> {
    socket.shutdown().await?;
    let mut bytes = [0; 256];
    let mut unasked = 0;
    while unasked <= UNASKED_BYTES_MAX {
        let count = socket.read(&mut bytes).await?;
        if count == 0 {
            break;
        }
        unasked += count;
    }
    Ok(())
}
