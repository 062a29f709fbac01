//! Reads Server-Sent Events, many streams a thread: no buffer of its own while nothing comes.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use memchr::memmem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::client::Head;

/// Bytes that are read at once.
const READ_BYTES: usize = 16 * 1024;
/// How long a stream may take to open.
const OPEN_DEADLINE: Duration = Duration::from_secs(30);

/// One open stream.
#[derive(Debug)]
pub(super) struct Stream {
    socket: TcpStream,
    framing: Framing,
    /// What is not a whole event yet.
    text: Vec<u8>,
}

/// One event: its name and its data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event<'a> {
    pub(super) name: &'a [u8],
    pub(super) data: &'a [u8],
}

/// Where in the transfer coding the next byte stands.
#[derive(Clone, Copy, Debug)]
enum Framing {
    Plain,
    Size(usize),
    Data(usize),
    AfterData,
}

impl Stream {
    /// Opens a stream. An answer other than 200 is an error that says so.
    pub(super) async fn open(address: SocketAddr, path: &str) -> io::Result<Self> {
        let open = timeout(OPEN_DEADLINE, Self::open_patiently(address, path)).await;
        open.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    async fn open_patiently(address: SocketAddr, path: &str) -> io::Result<Self> {
        let mut socket = TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: bench\r\naccept: text/event-stream\r\n\r\n");
        socket.write_all(request.as_bytes()).await?;
        let mut bytes = Vec::new();
        let head = loop {
            if socket.read_buf(&mut bytes).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(head) = Head::of(&bytes) {
                break head;
            }
        };
        if head.status != 200 {
            while bytes.len() < head.bytes + head.body_bytes {
                if socket.read_buf(&mut bytes).await? == 0 {
                    break;
                }
            }
            let said = String::from_utf8_lossy(&bytes[head.bytes..]);
            return Err(io::Error::other(format!(
                "the stream is refused ({}): {said}",
                head.status
            )));
        }
        let framing = if head.is_chunked { Framing::Size(0) } else { Framing::Plain };
        let mut stream = Self { socket, framing, text: Vec::new() };
        stream.unframe(&bytes[head.bytes..])?;
        Ok(stream)
    }

    /// Waits until something comes, and gives each event that is whole.
    pub(super) async fn read(&mut self, mut each: impl FnMut(Event<'_>)) -> io::Result<()> {
        if self.give(&mut each) > 0 {
            return Ok(());
        }
        self.socket.readable().await?;
        self.read_ready(each)
    }

    /// Gives what has come by now, without waiting.
    pub(super) fn read_ready(&mut self, mut each: impl FnMut(Event<'_>)) -> io::Result<()> {
        self.give(&mut each);
        let mut bytes = [0; READ_BYTES];
        loop {
            match self.socket.try_read(&mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    self.unframe(&bytes[..read])?;
                    self.give(&mut each);
                    if read < bytes.len() {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes off the chunks' framing.
    fn unframe(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while let Some(first) = bytes.first() {
            match self.framing {
                Framing::Plain => {
                    self.text.extend_from_slice(bytes);
                    return Ok(());
                }
                Framing::Size(size) => {
                    self.framing = match (first, char::from(*first).to_digit(16)) {
                        (_, Some(digit)) => Framing::Size(size * 16 + digit as usize),
                        (b'\r', _) => Framing::Size(size),
                        (b'\n', _) if size == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        (b'\n', _) => Framing::Data(size),
                        _ => return Err(io::Error::other("the chunks' framing is broken")),
                    };
                    bytes = &bytes[1..];
                }
                Framing::Data(left) => {
                    let (data, rest) = bytes.split_at(left.min(bytes.len()));
                    self.text.extend_from_slice(data);
                    bytes = rest;
                    self.framing = match left - data.len() {
                        0 => Framing::AfterData,
                        left => Framing::Data(left),
                    };
                }
                Framing::AfterData => {
                    if *first == b'\n' {
                        self.framing = Framing::Size(0);
                    }
                    bytes = &bytes[1..];
                }
            }
        }
        Ok(())
    }

    /// Gives the events that are whole; how many.
    fn give(&mut self, each: &mut impl FnMut(Event<'_>)) -> usize {
        let (mut from, mut count) = (0, 0);
        for end in memmem::find_iter(&self.text, b"\n\n") {
            // `\n\n\n` would be found once too often.
            if end < from {
                continue;
            }
            each(Event::of(&self.text[from..end]));
            (from, count) = (end + 2, count + 1);
        }
        if from == self.text.len() {
            self.text.clear();
        } else if from > 0 {
            self.text.drain(..from);
        }
        count
    }
}

impl<'a> Event<'a> {
    fn of(block: &'a [u8]) -> Self {
        let mut event = Self { name: b"", data: b"" };
        for line in block.split(|byte| *byte == b'\n') {
            if let Some(name) = line.strip_prefix(b"event: ") {
                event.name = name;
            } else if let Some(data) = line.strip_prefix(b"data: ") {
                event.data = data;
            }
        }
        event
    }

    pub(super) fn is(&self, name: &str) -> bool {
        self.name == name.as_bytes()
    }
}
