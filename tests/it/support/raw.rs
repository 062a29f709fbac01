//! Requests as bytes, for what no HTTP client would send.

use std::time::Duration;

use futures_util::future::join_all;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Answer, Replica, eventually};

/// A request that takes longer than this hangs.
const HUNG: Duration = Duration::from_secs(10);

/// A connection to a replica.
pub async fn connect(replica: &Replica) -> TcpStream {
    let address = replica.url.strip_prefix("http://").expect("plain HTTP");
    TcpStream::connect(address).await.expect("a connection")
}

/// Sends bytes over a connection of their own and reads one answer. `None`: the server closed the
/// connection without one. Of a stream only the head is read.
///
/// # Panics
/// When there is no answer in time.
pub async fn exchange(replica: &Replica, request: &[u8]) -> Option<Answer> {
    let (mut reader, mut writer) = connect(replica).await.into_split();
    // At the same time: the server may answer, and close, before it has read everything.
    let send = async {
        let _ = writer.write_all(request).await;
        std::future::pending::<()>().await;
    };
    let is_head = request.starts_with(b"HEAD ");
    let receive = timeout(HUNG, read_answer(&mut reader, is_head));
    tokio::select! {
        () = send => unreachable!("it never ends"),
        answer = receive => answer.unwrap_or_else(|_| panic!(
            "hung: {}",
            String::from_utf8_lossy(&request[..request.len().min(2_000)])
        )),
    }
}

/// Reads one answer; `None`: the connection was closed without one. Of a stream only the head is read.
///
/// # Panics
/// When what comes is no answer.
pub async fn read_answer(from: &mut (impl AsyncReadExt + Unpin), is_head: bool) -> Option<Answer> {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        if from.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
            return None;
        }
    };
    let head = std::str::from_utf8(&bytes[..head_end]).expect("an answer's head is ASCII");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status: {head}"));
    let mut headers = HeaderMap::new();
    for (name, value) in head.lines().skip(1).filter_map(|l| l.split_once(": ")) {
        let name: HeaderName = name.parse().expect("a header's name");
        headers.append(name, HeaderValue::from_str(value).expect("its value"));
    }
    let length = headers
        .get("content-length")
        .map_or(0, |value| value.to_str().expect("ASCII").parse().expect("a number of bytes"));
    let end = head_end + if is_head { 0 } else { length };
    while bytes.len() < end {
        let read = from.read_buf(&mut bytes).await.unwrap_or(0);
        assert!(read > 0, "the answer was cut off");
    }
    let text = String::from_utf8(bytes[head_end..end].to_vec()).expect("UTF-8");
    Some(Answer { status, headers, text })
}

/// The bytes of a request with a body and its length.
pub fn request(method: &str, target: &[u8], headers: &[(&str, &[u8])], body: &[u8]) -> Vec<u8> {
    let mut bytes = method.as_bytes().to_vec();
    bytes.extend([b" ", target, b" HTTP/1.1\r\nHost: test\r\n"].concat());
    for (name, value) in headers {
        bytes.extend([name.as_bytes(), b": ", value, b"\r\n"].concat());
    }
    bytes.extend(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
    bytes.extend(body);
    bytes
}

/// The bytes of a request with a JSON body.
pub fn json_request(method: &str, target: &str, body: &[u8]) -> Vec<u8> {
    let kind: [(&str, &[u8]); 1] = [("Content-Type", b"application/json")];
    request(method, target.as_bytes(), &kind, body)
}

/// What one replica was before it was mistreated.
pub struct Soundness {
    replica_id: String,
    pid: u32,
}

impl Soundness {
    pub async fn of(replica: &Replica) -> Self {
        // Its connections to Postgres are there from now on: no answer is late for want of one.
        eventually("many requests at once are answered", async || {
            let asks = (0..32).map(|_| replica.get("/v1/workers/connected"));
            let answers = join_all(asks).await;
            answers.iter().all(|answer| answer.status == 200).then_some(())
        })
        .await;
        let ready = replica.get("/readyz").await.expect(200);
        Self {
            replica_id: ready["replica_id"].as_str().expect("an id").to_owned(),
            pid: replica.pid(),
        }
    }

    /// It is the same process, it never panicked, it never answered 500, and it is ready.
    pub async fn holds(&self, replica: &Replica) {
        let ready = replica.get("/readyz").await.expect(200);
        assert_eq!(ready["status"], "ready");
        assert_eq!(ready["replica_id"], self.replica_id.as_str());
        assert_eq!(replica.pid(), self.pid);
        assert!(!replica.log().contains("panicked"), "it panicked");
        let metrics = replica.get("/metrics").await.text;
        assert!(metrics.contains("status=\"200\""), "{metrics}");
        assert!(!metrics.contains("status=\"500\""), "{metrics}");
    }
}
