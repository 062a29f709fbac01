//! Clients that misbehave, a bounded number of them, next to honest work: those that read nothing or
//! hardly anything, those that take for ever to ask, and those that ask what nobody would.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use super::faults::Fault;
use super::larger::More;
use super::producers::GROUPS;

/// Clients of one fault.
const READERS: usize = 25;
const TRICKLERS: usize = 80;
const IDLERS: usize = 150;
/// What a reader that does not read has room for.
const SMALL_BUFFER_BYTES: u32 = 4 * 1024;
/// Between two bytes of a request that takes for ever.
const TRICKLE: Duration = Duration::from_millis(300);
/// How long a strange request may go unanswered. The server closes what it cannot read.
const ANSWER_WAIT: Duration = Duration::from_secs(12);
/// Deeper than any reader of JSON goes down.
const DEPTH: usize = 10_000;

impl Fault {
    /// Against one replica, at its own address.
    pub async fn strike_server(self, more: &More, url: &str, during: Duration) {
        let address = url.trim_start_matches("http://");
        let until = Instant::now() + during;
        match self {
            Self::ReadersStuck => all(READERS, |n| reader(address, n, until, false)).await,
            Self::ReadersSlow => all(READERS, |n| reader(address, n, until, true)).await,
            Self::HeadsTrickle => all(TRICKLERS, |_| trickle(address, b"", until)).await,
            Self::BodiesTrickle => {
                let head =
                    b"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
                             Content-Length: 5000\r\n\r\n";
                all(TRICKLERS, |_| trickle(address, head, until)).await;
            }
            Self::IdleConnections => {
                let idle = join_all((0..IDLERS).map(|_| TcpStream::connect(address))).await;
                sleep(during).await;
                drop(idle);
            }
            Self::HostileHeads => hostile_heads(more, address).await,
            Self::LargeBodies => large_bodies(more, url).await,
            _ => unreachable!("{self:?} is not for a server alone"),
        }
    }
}

async fn all<F: Future<Output = Option<()>>>(count: usize, client: impl Fn(usize) -> F) {
    join_all((0..count).map(client)).await;
}

/// A worker that is announced everything, and reads nothing, or ten bytes a second.
async fn reader(address: &str, n: usize, until: Instant, reads: bool) -> Option<()> {
    let socket = TcpSocket::new_v4().ok()?;
    socket.set_recv_buffer_size(SMALL_BUFFER_BYTES).ok()?;
    let mut stream = socket.connect(address.parse().ok()?).await.ok()?;
    let request = format!(
        "GET /v1/worker/tasks/stream?worker_id=reader-{n}&codebases=group-{} HTTP/1.1\r\nHost: x\r\n\r\n",
        n % GROUPS
    );
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut ten = [0; 10];
    while Instant::now() < until {
        sleep(Duration::from_secs(1).min(until.saturating_duration_since(Instant::now()))).await;
        if reads && timeout(Duration::from_secs(1), stream.read(&mut ten)).await.ok()?.ok()? == 0 {
            return None;
        }
    }
    Some(())
}

/// Sends `start`, then a byte at a time. `None` when the server has had enough.
async fn trickle(address: &str, start: &[u8], until: Instant) -> Option<()> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    stream.write_all(start).await.ok()?;
    let slow = b"GET /v1/workers/connected HTTP/1.1\r\nHost: x\r\nX-Slow: ".iter();
    for byte in slow.chain(std::iter::repeat(&b'x')) {
        if Instant::now() > until {
            break;
        }
        stream.write_all(&[*byte]).await.ok()?;
        sleep(TRICKLE).await;
    }
    Some(())
}

/// Each is refused or the connection closed; none is a 500, and none is taken for what it is not.
async fn hostile_heads(more: &More, address: &str) {
    let many = "X-Many: of these\r\n".repeat(500);
    let path = "/v1/worker/tasks/stream";
    let requests = [
        format!("GET {path}?worker_id=a HTTP/1.1\r\nHost: x\r\nX-Worker-ID: b\r\n\r\n"),
        format!("GET {path} HTTP/1.1\r\nHost: x\r\nX-Worker-ID: a\r\nX-Worker-ID: b\r\n\r\n"),
        format!("GET {path} HTTP/1.1\r\nHost: x\r\nX-Worker-ID: a\r\n folded\r\n\r\n"),
        format!("GET {path} HTTP/1.1\r\nHost: x\r\nX-Worker-ID: a\0b\r\n\r\n"),
        format!("GET {path} HTTP/1.1\r\nHost: x\r\nX-Worker-ID: {}\r\n\r\n", "a".repeat(1 << 20)),
        format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(1 << 20)),
        format!("GET {path} HTTP/1.1\r\nHost: x\r\n{many}{many}\r\n"),
        "POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}"
            .to_owned(),
        "POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n".to_owned(),
        "POST /v1/tasks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n".to_owned(),
        "\0\u{1}\u{2} nothing of this is HTTP\r\n\r\n".to_owned(),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nand nothing that follows".to_owned(),
    ];
    let asked = requests.iter().map(|request| async move {
        let mut stream = TcpStream::connect(address).await.ok()?;
        let (mut from, mut to) = stream.split();
        let mut start = vec![0; 64];
        // At the same time: the server may answer before it has read all.
        let send = async {
            let _ = to.write_all(request.as_bytes()).await;
            std::future::pending::<()>().await;
        };
        let count = tokio::select! {
            () = send => 0,
            read = timeout(ANSWER_WAIT, from.read(&mut start)) => read.ok()?.ok()?,
        };
        Some((request, String::from_utf8_lossy(&start[..count]).into_owned()))
    });
    for (request, answer) in join_all(asked).await.into_iter().flatten() {
        if answer.starts_with("HTTP/1.1 2") || answer.starts_with("HTTP/1.1 500") {
            let request: String = request.chars().take(120).collect();
            more.ledger.violation(format!("{request:?} got {answer:?} (F50)"));
        }
    }
}

/// Too large, too deep, both at once: refused. As large as allowed: welcome, and somebody's work.
async fn large_bodies(more: &More, url: &str) {
    let deep = format!("{}{}", "[".repeat(DEPTH), "]".repeat(DEPTH));
    let refused = [
        json!({"title": "large", "prompt": "x".repeat(3 << 20)}).to_string(),
        json!({"title": "large", "metadata": {"x": "x".repeat(400 << 10)}}).to_string(),
        format!(r#"{{"title": "deep", "metadata": {{"x": {deep}}}}}"#),
        deep,
    ];
    for body in refused {
        let length = body.len();
        let request = more.http.post(format!("{url}/v1/tasks")).body(body);
        let answer = request.header("Content-Type", "application/json").send().await;
        if let Ok(answer) = answer
            && !matches!(answer.status().as_u16(), 400 | 408 | 413 | 422 | 503)
        {
            more.ledger
                .violation(format!("a body of {length} bytes got {} (F55)", answer.status()));
        }
    }
    for n in 0..3 {
        let title = format!("large-{}-{n}", uuid::Uuid::new_v4());
        let body = json!({
            "title": title, "codebase_id": format!("group-{n}"), "prompt": "x".repeat(1 << 20),
            "max_attempts": super::producers::ATTEMPTS,
        });
        more.create_task(url, &title, &body).await;
    }
}
