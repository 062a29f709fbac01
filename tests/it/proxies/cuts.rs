//! Clients that are cut at a certain age: every 15 s by Envoy's default route timeout (F46).

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use serde_json::json;

use super::crew::{Crew, Return, Worker};
use super::cutter::Cutter;
use crate::campaign::Campaign;
use crate::support::{Replica, TestDb};

const TASKS_PER_SECOND: u32 = 50;
/// Tasks that nobody does, so that a stream always begins with a full window.
const BACKLOG: usize = 300;
/// `WORKER_SSE_WINDOW` by default.
const WINDOW: usize = 128;
/// What the announcements of a full window take, at most (S8): 32 KiB of them, and the last one of
/// 16 KiB; twice, because more important ones go on top.
const WINDOW_BYTES_MAX: usize = 2 * (32 + 16) * 1024;

#[tokio::test]
async fn workers_that_are_cut_again_and_again_lose_nothing_and_hear_at_most_a_window_again() {
    let campaign = Campaign::new(
        "workers_that_are_cut_again_and_again_lose_nothing_and_hear_at_most_a_window_again",
    );
    let age = campaign.number("CUT_AGE_MS", 1_000);
    let seconds = campaign.number("CUT_SECONDS", 10);
    let workers = campaign.number("CUT_WORKERS", 6);
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let servers = replicas.iter().map(|one| one.url["http://".len()..].parse().unwrap()).collect();
    let cutter = Cutter::to(servers, Duration::from_millis(age as u64)).await;
    // Less important than the work, or it would be in the way.
    let later = json!({"title": "not now", "codebase_id": "global", "priority": -1});
    replicas[0].post("/v1/tasks/batch", json!(vec![later; BACKLOG])).await.expect(201);

    let crew = Crew::new(cutter.address, Return::AtOnce);
    // Two of them want the same tasks.
    let codebase = |n: usize| format!("group-{}", n / 2);
    let worker = |n| Worker { id: format!("w-{n}"), codebases: codebase(n), acts: true };
    // And who only listens is told the same again with each new stream.
    let listener = |n| Worker { id: format!("l-{n}"), codebases: codebase(n), acts: false };
    let all = (0..workers).map(worker).chain((0..workers).map(listener));
    let hired = crew.hire(all.collect()).await;
    let producer = crew.produce((0..workers).map(codebase).collect(), TASKS_PER_SECOND);
    // Not a condition: the run's length.
    tokio::time::sleep(Duration::from_secs(seconds as u64)).await;
    producer.stop().await;
    crew.prove(&db).await;
    crew.dismiss(hired);

    let tally = &crew.tally;
    let of = |count: &std::sync::atomic::AtomicUsize| count.load(Relaxed);
    let (resumes, again) = (of(&tally.broken), of(&tally.announced_again));
    campaign.figures(&format!(
        "{workers} workers and {workers} listeners cut every {age} ms: {} connections cut, {resumes} streams; {} tasks, each \
         done once, {} calls repeated ({}); announced again: {again}, {} a stream, {} at most; \
         at most {} bytes on one stream",
        of(&cutter.cuts),
        of(&tally.completed),
        of(&tally.repeated_calls),
        crew.unanswered(),
        again / resumes.max(1),
        of(&tally.again_max),
        of(&tally.bytes_max),
    ));
    assert!(resumes >= workers, "it was cut");
    assert!(of(&tally.again_max) <= WINDOW, "at most a window is told again");
    let new_bytes = 1024 * TASKS_PER_SECOND as usize * age / 1000;
    assert!(of(&tally.bytes_max) <= WINDOW_BYTES_MAX + 2 * new_bytes, "the cost of a resume");
}
