//! `taskwire bench`: what this server does, beside what Postgres and sockets do without it.
//!
//! Each measurement starts replicas of this very program as processes of their own, on a database of its
//! own, and takes its floor in the same rounds as its figure. The load comes from one thread, so that most
//! of the machine is left to what is measured. Everything speaks over loopback, is bounded in size and time,
//! and ends with this process.
//!
//! Nothing else in the server knows of this folder.

#![expect(clippy::cast_precision_loss, reason = "counts of a benchmark are far below 2^52")]

mod activity;
mod claims;
mod client;
mod creates;
mod drain;
mod fanout;
mod figures;
mod floors;
mod ground;
mod growth;
mod herd;
mod life;
mod load;
mod machine;
mod memory;
mod minimal;
mod peers_row;
mod pgbench;
mod push;
mod replicas;
mod report;
mod schedule;
mod sizes;
mod sse;
mod streams;
mod workers;

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::config::Config;
use ground::Ground;
use report::Report;
pub use sizes::Sizes;

/// An error that ends the benchmark.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What can be measured, in the order of `all`.
pub const MEASUREMENTS: [&str; 8] =
    ["push", "creates", "claims", "life", "fanout", "memory", "growth", "herd"];
/// Besides, and not in `all`: the row of this server in the table of peers.
pub const PEERS_ROW: &str = peers_row::NAME;
/// What a row says whose feature the server does not have.
const NOT_IN_THIS_BUILD: &str = "not in this build";
/// A measurement that takes longer than this hangs.
const MEASUREMENT_DEADLINE: Duration = Duration::from_hours(2);

/// How to measure. `None`: what suits the measurement.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Names of [`MEASUREMENTS`], or [`PEERS_ROW`].
    pub measurements: Vec<String>,
    /// Where the JSON goes; `-`: to standard output, in place of the table.
    pub json: Option<PathBuf>,
    /// How long each figure is measured in each round.
    pub seconds: Option<f64>,
    /// Figures are the medians of so many rounds.
    pub rounds: Option<usize>,
    /// Sizes that only show that it works.
    pub quick: bool,
    /// How much of everything.
    pub sizes: Sizes,
}

/// What every measurement is asked with.
struct Asked<'a> {
    ground: &'a Ground,
    seconds: f64,
    rounds: usize,
    sizes: Sizes,
    is_quick: bool,
}

/// A run that only shows that it works waits for less.
const QUICK_SHARE: u32 = 20;

impl Asked<'_> {
    /// How long to leave a server alone.
    fn pause(&self, usual: Duration) -> Duration {
        if self.is_quick { usual / QUICK_SHARE } else { usual }
    }
}

/// Measures, prints the table, and writes the JSON.
pub async fn run(
    config: &Config,
    options: &Options,
    stop: impl Future<Output = ()>,
) -> Result<(), Failure> {
    raise_file_limit();
    let ground = Ground::prepare(config).await?;
    let measured = tokio::select! {
        measured = measure(&ground, options) => measured,
        () = stop => Err("stopped".into()),
    };
    // The processes of a measurement that broke off are gone with it; now what they stood on.
    ground.close().await;
    measured
}

async fn measure(ground: &Ground, options: &Options) -> Result<(), Failure> {
    let asked = Asked {
        ground,
        seconds: options.seconds.unwrap_or(if options.quick { 0.3 } else { 5.0 }),
        rounds: options.rounds.unwrap_or(if options.quick { 1 } else { 3 }).max(1),
        sizes: options.sizes,
        is_quick: options.quick,
    };
    if options.measurements.iter().any(|name| name == PEERS_ROW) {
        let row = peers_row::run(&asked).await?;
        return write_json(options.json.as_deref().unwrap_or(Path::new("-")), &row);
    }
    let mut report = Report {
        postgres: ground.version.clone(),
        pgbench: ground.pgbench.as_ref().map(|pgbench| pgbench.version.clone()),
        settings: json!({
            "measurements": options.measurements,
            "seconds": asked.seconds,
            "rounds": asked.rounds,
            "quick": options.quick,
            "sizes": asked.sizes,
        }),
        ..Report::default()
    };
    let mut result = Ok(());
    for name in &options.measurements {
        let measuring = async {
            match name.as_str() {
                "push" => push::run(&asked, &mut report).await,
                "creates" => creates::run(&asked, &mut report).await,
                "claims" => claims::run(&asked, &mut report).await,
                "life" => life::run(&asked, &mut report).await,
                "fanout" => fanout::run(&asked, &mut report).await,
                "memory" => memory::run(&asked, &mut report).await,
                "growth" => growth::run(&asked, &mut report).await,
                "herd" => herd::run(&asked, &mut report).await,
                _ => Err("there is no such measurement".into()),
            }
        };
        let measured = timeout(MEASUREMENT_DEADLINE, measuring).await;
        let measured = measured.unwrap_or_else(|_| Err("it did not end in time".into()));
        if let Err(error) = measured {
            result = Err(format!("{name}: {error}").into());
            break;
        }
    }
    // Also after a failure: what was measured before it took its time.
    if options.json.as_deref() != Some(Path::new("-")) {
        print(&report.table());
    }
    if let Some(path) = &options.json {
        write_json(path, &report.json())?;
    }
    result
}

fn write_json(path: &Path, json: &Value) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(json)?;
    if path == Path::new("-") {
        print(&text);
        return Ok(());
    }
    Ok(fs::write(path, text + "\n")?)
}

/// The hidden server for the floors of HTTP.
pub async fn minimal() -> std::io::Result<()> {
    raise_file_limit();
    minimal::serve().await
}

/// Ends this process when whoever started it closes its standard input, as its end does.
pub fn end_with_parent() {
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
}

/// Thousands of sockets are as many files.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if setrlimit(Resource::Nofile, raised).is_err() {
        say("the limit of open files could not be raised");
    }
}

/// Where it is, for whoever waits. Not among the results.
#[expect(clippy::print_stderr, reason = "the progress of a program for people")]
fn say(text: &str) {
    eprintln!("bench: {text}");
}

fn print(text: &str) {
    // Nobody may be there to read it.
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}
