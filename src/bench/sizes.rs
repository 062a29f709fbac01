//! How much of everything.

use serde::Serialize;

/// Sizes of the measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sizes {
    /// Workers whose tasks' whole life is measured.
    pub workers: usize,
    /// Tasks that one worker drains.
    pub drained: usize,
    /// Streams that one task is sent to.
    pub fanout_streams: usize,
    /// Streams that are idle, or told of a task for few.
    pub idle_streams: usize,
    /// Workers that all want one task.
    pub herd_workers: usize,
    /// Finished tasks of a table that has grown.
    pub finished: u64,
    /// Pending ones.
    pub pending: u64,
    /// How long another session holds a transaction open, in seconds.
    pub held_seconds: f64,
}

impl Sizes {
    /// What a run is compared by.
    pub const USUAL: Self = Self {
        workers: 200,
        drained: 20_000,
        fanout_streams: 5_000,
        idle_streams: 10_000,
        herd_workers: 5_000,
        finished: 1_000_000,
        pending: 250_000,
        held_seconds: 60.0,
    };
    /// A table as large as it gets; takes long to fill.
    pub const FULL: Self =
        Self { finished: 10_000_000, pending: 1_000_000, held_seconds: 600.0, ..Self::USUAL };
    /// Enough to show that it works.
    pub const QUICK: Self = Self {
        workers: 8,
        drained: 300,
        fanout_streams: 40,
        idle_streams: 100,
        herd_workers: 30,
        finished: 2_000,
        pending: 20_000,
        held_seconds: 1.0,
    };

    /// Those that can be chosen, and what each means.
    pub const NAMES: [(&'static str, &'static str); 7] = [
        ("workers", "life: workers with a stream"),
        ("drained", "life: tasks that one worker drains"),
        ("fanout-streams", "fanout: streams that hear of one task"),
        ("idle-streams", "fanout, memory: streams of which few or none hear"),
        ("herd-workers", "herd: workers that want one task"),
        ("finished", "growth: finished tasks"),
        ("pending", "growth: pending tasks"),
    ];

    /// Chooses one of [`Self::NAMES`].
    pub fn set(&mut self, name: &str, count: u64) {
        let size = usize::try_from(count).unwrap_or(usize::MAX);
        match name {
            "workers" => self.workers = size,
            "drained" => self.drained = size,
            "fanout-streams" => self.fanout_streams = size,
            "idle-streams" => self.idle_streams = size,
            "herd-workers" => self.herd_workers = size,
            "finished" => self.finished = count,
            "pending" => self.pending = count,
            _ => {}
        }
    }
}

impl Default for Sizes {
    fn default() -> Self {
        Self::USUAL
    }
}
