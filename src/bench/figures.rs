//! Numbers of many: percentiles of latencies, medians of rounds.

use std::time::Duration;

/// Latencies of one run, sorted.
#[derive(Clone, Debug)]
pub(super) struct Latencies(Vec<Duration>);

impl Latencies {
    pub(super) fn new(mut all: Vec<Duration>) -> Self {
        all.sort_unstable();
        Self(all)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The latency that this share of all, 0 to 1, does not exceed, in ms.
    pub(super) fn ms_at(&self, share: f64) -> f64 {
        let place = share_of(self.0.len(), share);
        self.0.get(place).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1000.0)
    }

    pub(super) fn p50_ms(&self) -> f64 {
        self.ms_at(0.5)
    }

    pub(super) fn p99_ms(&self) -> f64 {
        self.ms_at(0.99)
    }

    pub(super) fn max_ms(&self) -> f64 {
        self.ms_at(1.0)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a place in a list, from a share between 0 and 1"
)]
fn share_of(count: usize, share: f64) -> usize {
    ((count as f64 * share).ceil() as usize).clamp(1, count.max(1)) - 1
}

/// The median; of an even number, the mean of the middle two.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_latency_that_was_measured() {
        let all = Latencies::new((1..=200).rev().map(Duration::from_millis).collect());
        assert_eq!((all.p50_ms(), all.p99_ms(), all.max_ms()), (100.0, 198.0, 200.0));
        let one = Latencies::new(vec![Duration::from_millis(7)]);
        assert_eq!((one.p50_ms(), one.p99_ms(), one.max_ms()), (7.0, 7.0, 7.0));
        assert!(Latencies::new(Vec::new()).p50_ms().is_nan());
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
    }
}
