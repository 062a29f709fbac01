//! A worker's stream over a bare socket: light enough for thousands, and with the bytes as the proxy
//! sent them: in chunks or not, compressed or not.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::Duration;

use flate2::write::GzDecoder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::PATIENCE;
use crate::support::sse::{Event, parse};

/// How long a proxy may take to answer that there is a stream.
const OPEN_WAIT: Duration = Duration::from_secs(10);

/// Where the body stands: all of it, or between which chunks.
#[derive(Clone, Copy)]
enum Chunks {
    None,
    /// This much of the present one is to come, with its line's end.
    Left(usize),
    /// A line with a chunk's size is next.
    Size,
    Over,
}

/// An answer to a request for a stream.
pub struct RawStream {
    pub status: u16,
    /// The answer's head, in lower case.
    pub head: String,
    /// The least to wait before the next one.
    pub retry: Duration,
    /// Bytes of the body as they came.
    pub received: usize,
    socket: TcpStream,
    /// As it came, not looked at yet.
    wire: Vec<u8>,
    chunks: Chunks,
    gzip: Option<GzDecoder<Vec<u8>>>,
    /// The body's plain text, not looked at yet.
    text: Vec<u8>,
}

impl RawStream {
    /// Asks for a stream.
    pub async fn open(server: SocketAddr, query: &str, headers: &str) -> io::Result<Self> {
        match timeout(OPEN_WAIT, Self::ask(server, query, headers)).await {
            Ok(answer) => answer,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    async fn ask(server: SocketAddr, query: &str, headers: &str) -> io::Result<Self> {
        let mut socket = TcpStream::connect(server).await?;
        socket.set_nodelay(true)?;
        let request = format!(
            "GET /v1/worker/tasks/stream?{query} HTTP/1.1\r\nHost: {server}\r\n{headers}\r\n"
        );
        socket.write_all(request.as_bytes()).await?;
        let mut wire = Vec::with_capacity(1024);
        let end = loop {
            if let Some(end) = wire.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            if socket.read_buf(&mut wire).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        };
        let head: Vec<u8> = wire.drain(..end).collect();
        let head = String::from_utf8_lossy(&head).to_lowercase();
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_default();
        let is_chunked = head.contains("transfer-encoding: chunked");
        let gzip = head.contains("content-encoding: gzip").then(|| GzDecoder::new(Vec::new()));
        let chunks = if is_chunked { Chunks::Size } else { Chunks::None };
        let (retry, text) = (Duration::ZERO, Vec::new());
        Ok(Self { status, head, retry, received: 0, socket, wire, chunks, gzip, text })
    }

    /// Whether the answer is compressed.
    pub fn is_compressed(&self) -> bool {
        self.gzip.is_some()
    }

    /// The next event, however long it takes; `None` at the end of the stream.
    pub async fn read(&mut self) -> Option<Event> {
        loop {
            self.unpack();
            if let Some(end) = self.text.windows(2).position(|two| two == b"\n\n") {
                let block: Vec<u8> = self.text.drain(..end + 2).collect();
                let block = std::str::from_utf8(&block).expect("UTF-8");
                let retry = block.strip_prefix("retry: ").and_then(|text| text.split_once('\n'));
                if let Some((ms, _)) = retry {
                    self.retry = Duration::from_millis(ms.parse().expect("milliseconds"));
                }
                return Some(parse(block));
            }
            if matches!(self.chunks, Chunks::Over) {
                return None;
            }
            match self.socket.read_buf(&mut self.wire).await {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.received += count,
            }
        }
    }

    /// The next event within a time.
    pub async fn read_within(&mut self, limit: Duration) -> Option<Event> {
        timeout(limit, self.read()).await.ok().flatten()
    }

    /// The next event of this name, passing over all others.
    pub async fn expect(&mut self, name: &str) -> Event {
        let find = async {
            while let Some(event) = self.read().await {
                if event.name == name {
                    return event;
                }
            }
            panic!("the stream ended before {name}");
        };
        timeout(PATIENCE, find).await.unwrap_or_else(|_| panic!("no {name} in {PATIENCE:?}"))
    }

    /// Takes the chunks off what came, and decompresses it.
    fn unpack(&mut self) {
        loop {
            let count = match self.chunks {
                Chunks::None => self.wire.len(),
                // The line's end behind it is no content.
                Chunks::Left(left) => left.min(self.wire.len()),
                Chunks::Size => {
                    let Some(end) = self.wire.windows(2).position(|two| two == b"\r\n") else {
                        return;
                    };
                    let line: Vec<u8> = self.wire.drain(..end + 2).collect();
                    let size = String::from_utf8_lossy(&line[..end]).into_owned();
                    let size = usize::from_str_radix(size.trim(), 16).expect("a chunk's size");
                    self.chunks = if size == 0 { Chunks::Over } else { Chunks::Left(size + 2) };
                    continue;
                }
                Chunks::Over => return,
            };
            if count == 0 {
                return;
            }
            let mut piece: Vec<u8> = self.wire.drain(..count).collect();
            if let Chunks::Left(left) = self.chunks {
                piece.truncate(left.saturating_sub(2));
                let rest = left - count;
                self.chunks = if rest == 0 { Chunks::Size } else { Chunks::Left(rest) };
            }
            match &mut self.gzip {
                None => self.text.extend(piece),
                Some(gzip) => {
                    gzip.write_all(&piece).and_then(|()| gzip.flush()).expect("gzip");
                    self.text.append(gzip.get_mut());
                }
            }
        }
    }
}
