//! What one task costs in memory: the predicate, its frames, the streams that it is for.
//!
//! `cargo bench --bench micro`, or with a part of a name behind it.

use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use divan::Bencher;
use divan::counter::ItemsCount;
use serde_json::{Value, json};
use taskwire::domain::{
    ConnectionId, Fanout, Routing, Status, Task, TaskId, TaskRouting, WorkerId,
};
use taskwire::metrics::Metrics;
use taskwire::push::announcement::Announcement;
use taskwire::push::frames::TaskFrames;
use taskwire::push::hub::Hub;
use taskwire::push::mailbox::Mailbox;
use taskwire::push::stream::Stream;
use taskwire::push::window::{Offered, Verdict, Window};
use taskwire::store::{PushTask, Ready};

/// As `WORKER_SSE_WINDOW` by default.
const WINDOW_SIZE: usize = 128;

fn main() {
    divan::main();
}

/// A task with a prompt of so many bytes.
fn push_task(codebase_id: &str, prompt_bytes: usize) -> PushTask {
    let now = "2026-01-02T03:04:05.678901Z".parse().unwrap_or_default();
    let task = Task {
        id: TaskId::generate(),
        title: "Build the main branch".to_owned(),
        status: Status::Pending,
        codebase_id: codebase_id.to_owned(),
        priority: 5,
        required_capabilities: vec!["build".to_owned(), "test".to_owned()],
        target_worker_id: None,
        target_agent_name: None,
        agent_type: Some("builder".to_owned()),
        prompt: Some("make all\n".repeat(prompt_bytes / 9 + 1)),
        metadata: json!({"ref": "main", "labels": ["nightly", "linux"], "size": 3}),
        attempt: 0,
        max_attempts: 3,
        timeout_seconds: None,
        claim_epoch: 0,
        claimed_by: None,
        created_at: now,
        run_at: now,
        expires_at: None,
        claimed_at: None,
        finished_at: None,
        result: None,
        error: None,
        cancel_requested_at: None,
        cancel_reason: None,
        progress: None,
        message: None,
        checkpoint: None::<Value>,
    };
    PushTask { task, is_large: false, ready_xid: 1 }
}

fn routing(n: usize, codebases: Vec<String>) -> Routing {
    Routing {
        worker_id: WorkerId::parse(&format!("worker-{n}")).unwrap_or_else(|_| WorkerId::generate()),
        name: "builder".to_owned(),
        codebases,
        capabilities: ["build", "deploy", "test"].map(str::to_owned).to_vec(),
    }
}

mod predicate {
    use super::{Bencher, TaskRouting, routing};

    /// By how many codebases the worker has.
    #[divan::bench(args = [1, 10, 500])]
    fn matches(bencher: Bencher, codebases: usize) {
        let own = (0..codebases).map(|n| format!("organization/repository-{n}")).collect();
        let worker = routing(1, own);
        let capabilities = ["build", "test"].map(str::to_owned);
        let last = format!("organization/repository-{}", codebases - 1);
        let task = TaskRouting {
            codebase_id: &last,
            required_capabilities: &capabilities,
            target_worker_id: None,
            target_agent_name: None,
        };
        bencher.bench_local(|| divan::black_box(&worker).matches(divan::black_box(task)));
    }
}

mod frames {
    use super::{Bencher, TaskFrames, push_task};

    /// Both frames of a task, by the bytes of its prompt.
    #[divan::bench(args = [0, 1024, 12 * 1024])]
    fn encode(bencher: Bencher, prompt_bytes: usize) {
        let push = push_task("organization/repository", prompt_bytes);
        bencher.bench_local(|| TaskFrames::new(divan::black_box(&push)));
    }

    /// A prompt that is all quotes: each byte is escaped.
    #[divan::bench]
    fn encode_12_kib_of_quotes(bencher: Bencher) {
        let mut push = push_task("organization/repository", 0);
        push.task.prompt = Some("\"".repeat(6 * 1024));
        bencher.bench_local(|| TaskFrames::new(divan::black_box(&push)));
    }

    /// One that does not fit, and is told in part.
    #[divan::bench]
    fn encode_one_that_is_cut(bencher: Bencher) {
        let push = push_task("organization/repository", 17 * 1024);
        bencher.bench_local(|| TaskFrames::new(divan::black_box(&push)));
    }
}

/// A hub whose streams are spread evenly over some codebases, and have read their backlog.
struct Crowd {
    hub: Hub,
    streams: Vec<Arc<Stream>>,
}

impl Crowd {
    fn new(streams: usize, codebases: usize, fanout: Fanout) -> Self {
        let hub = Hub::new(Arc::new(Metrics::new()), Duration::ZERO, fanout);
        let stream = |n: usize| {
            let routing = routing(n, vec![codebase(n % codebases)]);
            let first = bytes::Bytes::from_static(b"event: connected\ndata: {}\n\n");
            let stream =
                hub.subscribe(ConnectionId::generate(), routing, WINDOW_SIZE, true, None, first);
            stream.refill(stream.refill_begin(), &[], true);
            stream
        };
        let streams = (0..streams).map(stream).collect();
        let crowd = Self { hub, streams };
        crowd.read();
        crowd
    }

    /// All streams' sockets take what waits for them, and their workers claim what they were told of.
    fn act(&self, task: &Announcement) {
        self.read();
        for stream in &self.streams {
            self.hub.asked(&stream.worker_id, taskwire::domain::Asked::Task(task.ready().id));
            self.hub.acted(&stream.worker_id, task.ready().id);
        }
    }

    fn read(&self) {
        let mut context = Context::from_waker(Waker::noop());
        for stream in &self.streams {
            while stream.mailbox.poll_take(&mut context).is_ready() {}
        }
    }

    /// Announces tasks of one codebase, one at a time, to streams that have room.
    fn bench(self, bencher: Bencher) {
        let last = std::cell::RefCell::new(None::<Announcement>);
        let next = || {
            if let Some(task) = last.take() {
                self.act(&task);
            }
            Announcement::new(push_task(&codebase(0), 100))
        };
        bencher.with_inputs(next).bench_local_values(|task| {
            self.hub.announce(std::slice::from_ref(&task));
            last.replace(Some(task));
        });
    }
}

fn codebase(n: usize) -> String {
    format!("organization/repository-{n}")
}

mod announce {
    use super::{Announcement, Bencher, Crowd, Fanout, ItemsCount, push_task};

    /// To so many streams that match.
    #[divan::bench(args = [1, 100, 5_000], sample_count = 300, sample_size = 1)]
    fn to_all_of(bencher: Bencher, streams: usize) {
        Crowd::new(streams, 1, Fanout::All).bench(bencher.counter(ItemsCount::new(streams)));
    }

    /// To ten streams that match, of so many: a codebase has ten.
    #[divan::bench(args = [100, 1_000, 10_000], sample_count = 300, sample_size = 1)]
    fn to_ten_of(bencher: Bencher, streams: usize) {
        Crowd::new(streams, streams / 10, Fanout::All).bench(bencher);
    }

    /// With `WORKER_SSE_FANOUT=3`.
    #[divan::bench(args = [100, 5_000], sample_count = 300, sample_size = 1)]
    fn to_three_of(bencher: Bencher, streams: usize) {
        Crowd::new(streams, 1, Fanout::First(3)).bench(bencher);
    }

    /// To nobody, beside so many streams.
    #[divan::bench(args = [100, 10_000], sample_count = 300, sample_size = 1)]
    fn to_none_of(bencher: Bencher, streams: usize) {
        let crowd = Crowd::new(streams, 10, Fanout::All);
        bencher
            .with_inputs(|| Announcement::new(push_task("another", 100)))
            .bench_local_refs(|task| crowd.hub.announce(std::slice::from_ref(task)));
    }
}

mod streams {
    use super::{Bencher, ConnectionId, Crowd, Fanout, WINDOW_SIZE, codebase, routing};

    /// A stream comes and goes, beside so many.
    #[divan::bench(args = [100, 10_000])]
    fn subscribe_and_unsubscribe(bencher: Bencher, streams: usize) {
        let crowd = Crowd::new(streams, 10, Fanout::All);
        let routing = routing(1_000_000, (0..10).map(codebase).collect());
        bencher.bench_local(|| {
            let (id, first) = (ConnectionId::generate(), bytes::Bytes::new());
            let stream = crowd.hub.subscribe(id, routing.clone(), WINDOW_SIZE, true, None, first);
            crowd.hub.unsubscribe(&stream)
        });
    }
}

mod window {
    use super::{Bencher, Instant, Offered, Ready, TaskId, Verdict, WINDOW_SIZE, Window};

    fn offered(xid: i64, priority: i32) -> Offered {
        let ready = Ready { id: TaskId::generate(), xid };
        Offered { ready, priority, bytes: 250, is_urgent: false }
    }

    /// A window with so many outstanding.
    fn window(outstanding: usize, now: Instant) -> Window {
        let mut window = Window::new(WINDOW_SIZE);
        for _ in 0..outstanding {
            window.note(offered(1, 0), now);
        }
        window
    }

    /// An announcement is considered, noted, read, claimed and remembered.
    #[divan::bench(args = [0, 96])]
    fn one_announcement(bencher: Bencher, outstanding: usize) {
        let now = Instant::now();
        let mut window = window(outstanding, now);
        bencher.with_inputs(|| offered(1, 0)).bench_local_values(|offer| {
            let verdict = window.consider(offer, now);
            assert_eq!(verdict, Verdict::Announce);
            window.note(offer, now);
            window.prove(offer.ready.id, now);
            window.settle(offer.ready.id)
        });
    }

    /// One that finds the window full, and matters more than what is in it or not.
    #[divan::bench(args = [0, 1])]
    fn one_that_finds_it_full(bencher: Bencher, priority: i32) {
        let now = Instant::now();
        let window = window(WINDOW_SIZE, now);
        bencher
            .with_inputs(|| offered(1, priority))
            .bench_local_values(|offer| window.consider(offer, now));
    }
}

mod mailbox {
    use super::{Bencher, Context, Mailbox, TaskFrames, Waker, push_task};

    /// Two frames go in and come out.
    #[divan::bench]
    fn put_and_take(bencher: Bencher) {
        let mailbox = Mailbox::default();
        let push = push_task("organization/repository", 100);
        let frames = TaskFrames::new(&push);
        let frames = [frames.available, frames.task];
        let mut context = Context::from_waker(Waker::noop());
        bencher.bench_local(|| {
            assert!(mailbox.put(&frames));
            while mailbox.poll_take(&mut context).is_ready() {}
        });
    }
}
