//! A proxy that is reloaded in mid-stream (F47), and a replica that is killed behind one (F25).

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::configs::Setup;
use super::crew::{Crew, Return, Worker};
use super::process::Kind;
use super::{Proxied, streams_on};
use crate::support::eventually;

const WORKERS: usize = 4;
const TASKS_PER_SECOND: u32 = 15;

/// `worker_shutdown_timeout` and `hard-stop-after` in our files: then the old processes close streams.
const OLD_PROCESSES_STAY: Duration = Duration::from_secs(30);

/// Workers that all want all tasks.
async fn hire(crew: &Arc<Crew>) -> Vec<tokio::task::JoinHandle<()>> {
    let worker = |n| Worker { id: format!("w-{n}"), codebases: "a".to_owned(), acts: true };
    let hired = crew.hire((0..WORKERS).map(worker).collect()).await;
    eventually("they are connected", async || {
        (crew.tally.open.load(Relaxed) == WORKERS).then_some(())
    })
    .await;
    hired
}

/// Waits until so many more tasks are done.
async fn done(crew: &Crew, more: usize) {
    let before = crew.tally.completed.load(Relaxed);
    eventually("work goes on", async || {
        (crew.tally.completed.load(Relaxed) >= before + more).then_some(())
    })
    .await;
}

async fn survives_a_reload(kind: Kind) {
    let Some(behind) = Proxied::start(kind, Setup::Shipped, &[]).await else { return };
    let crew = Crew::new(behind.address(), Return::AsTold);
    let hired = hire(&crew).await;
    let producer = crew.produce(vec!["a".to_owned()], TASKS_PER_SECOND);
    let first_reload = Instant::now();
    for _ in 0..3 {
        done(&crew, 10).await;
        let before = behind.proxy.workers();
        behind.proxy.reload();
        eventually("new processes serve", async || {
            behind.proxy.workers().iter().any(|pid| !before.contains(pid)).then_some(())
        })
        .await;
        done(&crew, 10).await;
    }
    producer.stop().await;
    crew.prove(&behind.db).await;
    // The streams are still those of before: the old processes serve them to their end.
    if first_reload.elapsed() < OLD_PROCESSES_STAY {
        assert_eq!(crew.tally.opened.load(Relaxed), WORKERS);
    }
    eprintln!(
        "{kind:?}: 3 reloads, {} tasks, {} calls repeated ({}), {} streams opened",
        crew.tally.completed.load(Relaxed),
        crew.tally.repeated_calls.load(Relaxed),
        crew.unanswered(),
        crew.tally.opened.load(Relaxed)
    );
    crew.dismiss(hired);
}

#[tokio::test]
async fn a_reload_of_the_proxy_in_mid_stream_costs_no_stream_and_no_task() {
    tokio::join!(survives_a_reload(Kind::Nginx), survives_a_reload(Kind::Haproxy));
}

async fn goes_on_without_a_killed_replica(kind: Kind) {
    let Some(mut behind) = Proxied::start(kind, Setup::Shipped, &[]).await else { return };
    let crew = Crew::new(behind.address(), Return::AsTold);
    let hired = hire(&crew).await;
    let producer = crew.produce(vec!["a".to_owned()], TASKS_PER_SECOND);
    for n in [0, 1] {
        done(&crew, 10).await;
        behind.replicas[n].take().expect("it runs").kill();
        eventually("all are connected to the other one", async || {
            (streams_on(&behind.http, behind.addresses[1 - n]).await == Some(WORKERS)).then_some(())
        })
        .await;
        done(&crew, 10).await;
        behind.boot(n).await;
        // A proxy that had left it alone looks at it again.
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    producer.stop().await;
    crew.prove(&behind.db).await;
    eprintln!(
        "{kind:?}: both replicas killed in turn, {} tasks, {} calls repeated ({}), {} streams opened, {} refused",
        crew.tally.completed.load(Relaxed),
        crew.tally.repeated_calls.load(Relaxed),
        crew.unanswered(),
        crew.tally.opened.load(Relaxed),
        crew.tally.refused.load(Relaxed),
    );
    crew.dismiss(hired);
}

#[tokio::test]
async fn a_proxy_goes_on_when_a_replica_is_killed_and_no_task_is_lost_or_done_twice() {
    tokio::join!(
        goes_on_without_a_killed_replica(Kind::Nginx),
        goes_on_without_a_killed_replica(Kind::Haproxy),
    );
}
