//! A lean HTTP/1.1 client: prepared bytes out, status and body in. It must not be what is measured.

use std::io::{self, Write};
use std::net::SocketAddr;

use memchr::memmem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bytes that an answer takes at first.
const INBOX_BYTES: usize = 4 * 1024;
/// An answer that is larger is none of ours.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// One keep-alive connection.
#[derive(Debug)]
pub(super) struct Connection {
    socket: TcpStream,
    inbox: Vec<u8>,
}

/// The answer to a call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer<'a> {
    pub(super) status: u16,
    pub(super) body: &'a [u8],
}

impl Answer<'_> {
    /// The answer as an error, when it is not the one that was expected.
    pub(super) fn expect(&self, status: u16) -> io::Result<()> {
        if self.status == status {
            return Ok(());
        }
        let body = String::from_utf8_lossy(self.body);
        Err(io::Error::other(format!("{status} was expected, {} came: {body}", self.status)))
    }
}

impl Connection {
    pub(super) async fn open(address: SocketAddr) -> io::Result<Self> {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, inbox: Vec::with_capacity(INBOX_BYTES) })
    }

    /// Sends a prepared request and reads its answer.
    pub(super) async fn call(&mut self, request: &[u8]) -> io::Result<Answer<'_>> {
        self.send(request).await?;
        self.answer().await
    }

    pub(super) async fn send(&mut self, request: &[u8]) -> io::Result<()> {
        self.socket.write_all(request).await
    }

    pub(super) async fn answer(&mut self) -> io::Result<Answer<'_>> {
        self.inbox.clear();
        let head = loop {
            if self.socket.read_buf(&mut self.inbox).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(head) = Head::of(&self.inbox) {
                break head;
            }
        };
        let end = head.bytes + head.body_bytes;
        if end > ANSWER_BYTES_MAX {
            return Err(io::Error::other(format!("an answer of {end} bytes")));
        }
        while self.inbox.len() < end {
            if self.socket.read_buf(&mut self.inbox).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(Answer { status: head.status, body: &self.inbox[head.bytes..end] })
    }
}

/// What matters of an answer's head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub(super) status: u16,
    /// Its own bytes, the empty line among them.
    pub(super) bytes: usize,
    pub(super) body_bytes: usize,
    pub(super) is_chunked: bool,
}

impl Head {
    /// `None`: it has not come whole yet.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let end = memmem::find(bytes, b"\r\n\r\n")? + 4;
        let head = std::str::from_utf8(&bytes[..end]).unwrap_or_default();
        let mut found = Self {
            status: head.get(9..12).and_then(|code| code.parse().ok()).unwrap_or(0),
            bytes: end,
            body_bytes: 0,
            is_chunked: false,
        };
        for (name, value) in head.split("\r\n").filter_map(|line| line.split_once(':')) {
            if name.eq_ignore_ascii_case("content-length") {
                found.body_bytes = value.trim().parse().unwrap_or(0);
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                found.is_chunked = value.trim().eq_ignore_ascii_case("chunked");
            }
        }
        Some(found)
    }
}

/// The bytes of a request with a JSON body.
pub(super) fn post(path: &str, body: &str) -> Vec<u8> {
    let mut request = Vec::new();
    post_into(&mut request, path, body);
    request
}

/// The same into a buffer that is used again and again.
pub(super) fn post_into(request: &mut Vec<u8>, path: &str, body: &str) {
    request.clear();
    // A Vec takes whatever is written.
    let _ = write!(
        request,
        "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
}

/// The bytes of a request without a body.
pub(super) fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n").into_bytes()
}

/// The text of a JSON member, as far as it needs no unescaping: `member` is such as `"id":"`.
pub(super) fn text_after<'a>(json: &'a [u8], member: &str) -> Option<&'a str> {
    let from = memmem::find(json, member.as_bytes())? + member.len();
    let end = memchr::memchr(b'"', &json[from..])?;
    std::str::from_utf8(&json[from..from + end]).ok()
}

/// A JSON member that is a whole number: `member` is such as `"claim_epoch":`.
pub(super) fn number_after(json: &[u8], member: &str) -> Option<i64> {
    let from = memmem::find(json, member.as_bytes())? + member.len();
    let digits = json[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&json[from..from + digits]).ok()?.parse().ok()
}
