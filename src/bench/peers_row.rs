//! Taskwire's row in the table of peers (benches/peers): the figures that every queue has, taken in the
//! way they are taken of the others.

use serde_json::{Value, json};

use super::creates::{batches, singles};
use super::drain::{self, Drain};
use super::figures::{Latencies, median};
use super::push::{Wait, pushes};
use super::replicas::replica;
use super::{Asked, Failure, say};

pub(super) const NAME: &str = "peers-row";

/// Connections of single creates.
const CONNECTIONS: [usize; 2] = [32, 128];

pub(super) async fn run(asked: &Asked<'_>) -> Result<Value, Failure> {
    let [mut started, mut announced]: [Vec<Latencies>; 2] = Default::default();
    let [mut c32, mut c128, mut batch]: [Vec<f64>; 3] = Default::default();
    for round in 1..=asked.rounds {
        say(&format!("{NAME}: round {round} of {}", asked.rounds));
        // Anew: what the last round has left would be announced, too.
        let database = asked.ground.database().await?;
        let server = replica(asked.ground, &database, &[]).await?;
        let Wait { heard, claimed } = pushes(&server, &server, asked.seconds).await?;
        announced.push(heard);
        started.push(claimed);
        c32.push(singles(&server, CONNECTIONS[0], asked.seconds).await?);
        c128.push(singles(&server, CONNECTIONS[1], asked.seconds).await?);
        batch.push(batches(&server, 1, asked.seconds).await?);
        server.end().await;
    }
    let (mut drains, mut best) = (serde_json::Map::new(), None::<f64>);
    for drain in Drain::ALL {
        let mut paces = Vec::new();
        for _ in 0..asked.rounds {
            paces.extend(drain::pace(asked, drain, asked.sizes.drained).await?);
        }
        if !paces.is_empty() {
            let pace = median(&paces);
            drains.insert(drain.what(), json!(pace.round()));
            best = Some(best.map_or(pace, |best| best.max(pace)));
        }
    }
    let of = |all: &[Latencies]| {
        json!({
            "p50": median(&all.iter().map(Latencies::p50_ms).collect::<Vec<_>>()),
            "p99": median(&all.iter().map(Latencies::p99_ms).collect::<Vec<_>>()),
        })
    };
    Ok(json!({
        "name": "taskwire",
        "version": env!("CARGO_PKG_VERSION"),
        "settings": "defaults; one replica, a process of its own, over HTTP on loopback",
        "idle_latency_ms": of(&started),
        "enqueue_per_s": {
            "c32": median(&c32).round(), "c128": median(&c128).round(), "batch100": median(&batch).round(),
        },
        "drain_per_s": best.map(f64::round),
        "notes": "idle latency: from the POST sent to the claim's answer, after which a worker starts; \
                  drain: the best of drains_per_s, one worker process",
        "idle_announced_ms": of(&announced),
        "drains_per_s": drains,
        "drained_tasks": asked.sizes.drained,
        "postgres": asked.ground.version,
        "seconds": asked.seconds,
        "rounds": asked.rounds,
    }))
}
