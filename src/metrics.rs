//! What `GET /metrics` tells (Prometheus text format). Counters are of this replica since its start.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// One label.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusCode {
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct What {
    what: &'static str,
}

/// The metrics of one replica.
#[derive(Debug)]
#[expect(missing_docs, reason = "each carries its help text below")]
pub struct Metrics {
    registry: Registry,
    pub streams_open: Gauge,
    pub announcements: Counter,
    pub backlog_reads: Counter,
    pub tasks_created: Counter,
    pub listener_losses: Counter,
    pub stalls: Counter,
    pub notification_queue_usage: Gauge<f64, AtomicU64>,
    dangers: Family<What, Gauge>,
    streams_ended: Family<Outcome, Counter>,
    claims: Family<Outcome, Counter>,
    heartbeats: Family<Outcome, Counter>,
    finishes: Family<Outcome, Counter>,
    reaped: Family<Outcome, Counter>,
    fanout: Family<Outcome, Counter>,
    responses: Family<StatusCode, Counter>,
}

impl Metrics {
    /// All metrics at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("taskwire");
        let streams_open = Gauge::default();
        let announcements = Counter::default();
        let backlog_reads = Counter::default();
        let tasks_created = Counter::default();
        let listener_losses = Counter::default();
        let stalls = Counter::default();
        let notification_queue_usage = Gauge::<f64, AtomicU64>::default();
        let dangers = Family::default();
        let streams_ended = Family::default();
        let claims = Family::default();
        let heartbeats = Family::default();
        let finishes = Family::default();
        let reaped = Family::default();
        let fanout = Family::default();
        let responses = Family::default();
        registry.register("streams_open", "Open worker streams", streams_open.clone());
        registry.register("announcements", "Tasks told to a worker", announcements.clone());
        registry.register("backlog_reads", "Statements for backlogs", backlog_reads.clone());
        registry.register("tasks_created", "Tasks created by API", tasks_created.clone());
        registry.register("listener_losses", "Lost LISTEN connections", listener_losses.clone());
        registry.register("stalls", "Times the process stood still for a second", stalls.clone());
        registry.register(
            "notification_queue_usage",
            "How full Postgres' notification queue is, 0 to 1",
            notification_queue_usage.clone(),
        );
        registry.register(
            "dangers",
            "1 while Postgres is not as safe as promised",
            dangers.clone(),
        );
        registry.register("streams_ended", "Streams that the server ended", streams_ended.clone());
        registry.register("claims", "Claims by outcome", claims.clone());
        registry.register("heartbeats", "Heartbeats of claims by outcome", heartbeats.clone());
        registry.register("finishes", "Ends of claims by outcome", finishes.clone());
        registry.register(
            "reaped",
            "Leases that ran out by what became of the claim",
            reaped.clone(),
        );
        registry.register("fanout", "Offers of tasks that begin with few workers", fanout.clone());
        registry.register("http_responses", "HTTP responses by status", responses.clone());
        Self {
            registry,
            streams_open,
            announcements,
            backlog_reads,
            tasks_created,
            listener_losses,
            stalls,
            notification_queue_usage,
            dangers,
            streams_ended,
            claims,
            heartbeats,
            finishes,
            reaped,
            fanout,
            responses,
        }
    }

    /// Notes whether something is wrong with Postgres.
    pub fn danger(&self, what: &'static str, is: bool) {
        self.dangers.get_or_create(&What { what }).set(i64::from(is));
    }

    /// Counts a stream that the server ended.
    pub fn stream_ended(&self, outcome: &'static str) {
        self.streams_ended.get_or_create(&Outcome { outcome }).inc();
    }

    /// Counts a claim.
    pub fn claim(&self, outcome: &'static str) {
        self.claims.get_or_create(&Outcome { outcome }).inc();
    }

    /// Counts several claims.
    pub fn claims(&self, outcome: &'static str, count: usize) {
        self.claims.get_or_create(&Outcome { outcome }).inc_by(count as u64);
    }

    /// Counts a heartbeat of a claim.
    pub fn heartbeat(&self, outcome: &'static str) {
        self.heartbeats.get_or_create(&Outcome { outcome }).inc();
    }

    /// Counts the end of a claim.
    pub fn finish(&self, outcome: &'static str) {
        self.finishes.get_or_create(&Outcome { outcome }).inc();
    }

    /// Counts leases that ran out.
    pub fn reaped(&self, outcome: &'static str, count: u64) {
        self.reaped.get_or_create(&Outcome { outcome }).inc_by(count);
    }

    /// Counts what was done with a task that is offered to few workers first.
    pub fn fanout(&self, outcome: &'static str) {
        self.fanout.get_or_create(&Outcome { outcome }).inc();
    }

    /// Counts a response.
    pub fn response(&self, status: u16) {
        self.responses.get_or_create(&StatusCode { status }).inc();
    }

    /// All of it, as Prometheus reads it.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
