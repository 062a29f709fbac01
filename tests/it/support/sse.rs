//! A worker's stream, read byte by byte as any client would.

use std::time::Duration;

use reqwest::Response;
use serde_json::Value;

use super::{PATIENCE, http_client};

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    pub name: String,
    pub data: Value,
    /// The hint how long to wait before a reconnect.
    pub retry_ms: Option<u64>,
}

impl Event {
    /// The id of the task that it is about.
    pub fn task(&self) -> &str {
        self.data["task_id"].as_str().or_else(|| self.data["id"].as_str()).unwrap_or_default()
    }
}

/// An open stream.
pub struct SseStream {
    pub response: Response,
    pub worker_id: String,
    unread: Vec<u8>,
}

impl SseStream {
    pub async fn open(server: &str, query: &str, headers: &[(&str, &str)]) -> Self {
        Self::get(&format!("{server}/v1/worker/tasks/stream?{query}"), headers).await
    }

    /// The events of one task.
    pub async fn follow(server: &str, task: &str) -> Self {
        Self::get(&format!("{server}/v1/tasks/{task}/events"), &[]).await
    }

    async fn get(url: &str, headers: &[(&str, &str)]) -> Self {
        let client = http_client().build().unwrap();
        let mut request = client.get(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.expect("the stream answers");
        assert_eq!(response.status(), 200, "{response:?}");
        Self { response, worker_id: String::new(), unread: Vec::new() }
    }

    /// Opens a stream where that may fail, as on a replica that is being killed.
    pub async fn try_open(client: &reqwest::Client, server: &str, query: &str) -> Option<Self> {
        let request = client.get(format!("{server}/v1/worker/tasks/stream?{query}")).send();
        let response = tokio::time::timeout(PATIENCE / 4, request).await.ok()?.ok()?;
        let is_stream = response.status() == 200;
        is_stream.then(|| Self { response, worker_id: String::new(), unread: Vec::new() })
    }

    /// The next event of whatever kind.
    pub async fn next(&mut self) -> Event {
        match self.next_within(PATIENCE).await {
            Some(event) => event,
            None => panic!("the stream ended, or nothing came within {PATIENCE:?}"),
        }
    }

    /// The next event; `None` at the end of the stream, or when nothing comes in time.
    pub async fn next_within(&mut self, limit: Duration) -> Option<Event> {
        tokio::time::timeout(limit, self.read()).await.ok().flatten()
    }

    /// The next event, however long it takes; `None` at the end of the stream.
    pub async fn read(&mut self) -> Option<Event> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|two| two == b"\n\n") {
                let block: Vec<u8> = self.unread.drain(..end + 2).collect();
                let event = parse(std::str::from_utf8(&block).expect("UTF-8"));
                if event.name == "connected" {
                    event.data["worker_id"].as_str().unwrap().clone_into(&mut self.worker_id);
                }
                return Some(event);
            }
            match self.response.chunk().await {
                Ok(Some(bytes)) => self.unread.extend_from_slice(&bytes),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// The next event of this kind; keepalives and `task` are passed over, nothing else is.
    pub async fn expect(&mut self, name: &str) -> Event {
        loop {
            let event = self.next().await;
            if event.name == name {
                return event;
            }
            assert!(
                ["keepalive", "task"].contains(&event.name.as_str()),
                "expected {name}, got {event:?}"
            );
        }
    }

    /// The next announced task.
    pub async fn announced(&mut self) -> String {
        self.expect("task_available").await.task().to_owned()
    }

    /// The next so many announced tasks, in their order.
    pub async fn announced_many(&mut self, count: usize) -> Vec<String> {
        let mut ids = Vec::with_capacity(count);
        while ids.len() < count {
            ids.push(self.announced().await);
        }
        ids
    }

    /// Whether the server ended the stream.
    pub async fn has_ended(&mut self) -> bool {
        tokio::time::timeout(PATIENCE, async { while self.read().await.is_some() {} }).await.is_ok()
    }
}

/// One event from its lines.
pub fn parse(block: &str) -> Event {
    let mut event = Event { name: String::new(), data: Value::Null, retry_ms: None };
    for line in block.lines() {
        if let Some(name) = line.strip_prefix("event: ") {
            name.clone_into(&mut event.name);
        } else if let Some(data) = line.strip_prefix("data: ") {
            event.data = serde_json::from_str(data).unwrap_or_else(|_| panic!("no JSON: {line}"));
        } else if let Some(ms) = line.strip_prefix("retry: ") {
            event.retry_ms = Some(ms.parse().expect("milliseconds"));
        } else {
            assert!(line.is_empty() || line == "id: ended", "unexpected line: {line:?}");
        }
    }
    event
}
