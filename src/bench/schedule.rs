//! An arrival schedule that does not wait for answers, with jitter, so that nothing beats in time with it.

use std::time::{Duration, Instant};

use tokio::time::sleep;

/// A timer wakes up to this late: the rest is waited out by looking.
const TIMER_SLACK: Duration = Duration::from_millis(2);

/// When to send.
#[derive(Debug)]
pub(super) struct Schedule {
    next: Instant,
    end: Instant,
    interval: Duration,
}

impl Schedule {
    pub(super) fn new(per_second: f64, seconds: f64) -> Self {
        let begun = Instant::now();
        Self {
            next: begun,
            end: begun + Duration::from_secs_f64(seconds),
            interval: Duration::from_secs_f64(1.0 / per_second),
        }
    }

    /// Waits for the next arrival: the moment it was meant for, which has passed when the sender was held
    /// up. `None`: it is over.
    pub(super) async fn next(&mut self) -> Option<Instant> {
        self.next += self.interval.mul_f64(rand::random_range(0.5..1.5));
        if self.next >= self.end {
            return None;
        }
        let left = self.next.saturating_duration_since(Instant::now());
        if left > TIMER_SLACK {
            sleep(left.saturating_sub(TIMER_SLACK)).await;
        }
        while Instant::now() < self.next {
            tokio::task::yield_now().await;
        }
        Some(self.next)
    }
}
