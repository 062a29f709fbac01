//! A client that calls any replica, and again until it is answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use serde_json::Value;
use tokio::join;

use super::fleet::Fleet;
use crate::support::{Answer, http_client};

/// Longer than any fault that makes a replica silent, so that most calls outlive it.
const CALL_WAIT: Duration = Duration::from_secs(5);

/// One client, with its own choices of replicas and pauses.
pub struct Caller {
    pub fleet: Arc<Fleet>,
    http: reqwest::Client,
    pub rng: StdRng,
}

/// The HTTP client that callers share.
pub fn http() -> reqwest::Client {
    http_client().timeout(CALL_WAIT).build().unwrap()
}

/// Each call over a connection of its own: what is cut is then one call.
pub fn http_without_reuse() -> reqwest::Client {
    http_client().timeout(CALL_WAIT).pool_max_idle_per_host(0).build().unwrap()
}

impl Caller {
    pub fn new(fleet: &Arc<Fleet>, http: &reqwest::Client, rng: StdRng) -> Self {
        Self { fleet: Arc::clone(fleet), http: http.clone(), rng }
    }

    /// The address of any replica's calls.
    pub fn any(&mut self) -> String {
        let slot = self.rng.random_range(0..self.fleet.slots.len());
        format!("http://{}", self.fleet.slots[slot].calls.address)
    }

    /// Calls until there is an answer that says what became of it. Two answers when calls are
    /// doubled.
    pub async fn ask(&mut self, path: &str, body: &Value, key: Option<&str>) -> Vec<Answer> {
        loop {
            let answers = self.once(path, body, key).await;
            if !answers.is_empty() {
                return answers;
            }
            // Every other time at once: the server may still be at the first one then.
            if self.chance(50) {
                self.pause(10, 100).await;
            }
        }
    }

    /// One try: no answer, one, or two.
    pub async fn once(&mut self, path: &str, body: &Value, key: Option<&str>) -> Vec<Answer> {
        let first = self.any();
        if !self.fleet.is_doubling.load(Ordering::Relaxed) {
            return self.send(&first, path, body, key).await.into_iter().collect();
        }
        let second = self.any();
        let (one, two) =
            join!(self.send(&first, path, body, key), self.send(&second, path, body, key));
        one.into_iter().chain(two).collect()
    }

    pub async fn send(
        &self,
        server: &str,
        path: &str,
        body: &Value,
        key: Option<&str>,
    ) -> Option<Answer> {
        let tally = &self.fleet.tally;
        let count = |what: &AtomicUsize| what.fetch_add(1, Ordering::Relaxed);
        count(&tally.calls);
        let mut request = self.http.post(format!("{server}{path}")).json(body);
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        let answer = async {
            let response = request.send().await.ok()?;
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            Some(Answer { status, headers, text: response.text().await.ok()? })
        };
        let Some(answer) = answer.await else {
            count(&tally.unanswered);
            return None;
        };
        match answer.status {
            408 | 503 => {
                count(&tally.put_off);
                None
            }
            200 | 201 | 403 | 404 | 409 => Some(answer),
            _ => {
                tally.violation(format!("{path} {body}: {answer:?}"));
                None
            }
        }
    }

    /// A pause of some milliseconds, as of a client that backs off or works.
    pub async fn pause(&mut self, from_ms: u64, to_ms: u64) {
        let pause = self.rng.random_range(from_ms..=to_ms);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    pub fn uuid(&mut self) -> String {
        uuid::Builder::from_random_bytes(self.rng.random()).into_uuid().to_string()
    }

    /// True in so many of a hundred cases.
    pub fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }
}
