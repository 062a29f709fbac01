//! `taskwire bench`, and the hidden servers that it starts.

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::serve::Signals;
use super::{Fatal, serve};
use crate::bench::{self, MEASUREMENTS, Options, PEERS_ROW, Sizes};
use crate::config::Config;

pub(super) fn command() -> Command {
    let names = MEASUREMENTS.into_iter().chain(["all", PEERS_ROW]);
    let option = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help)
    };
    Command::new("bench")
        .about("Measure this server on this machine, beside what Postgres does without it")
        .arg(
            Arg::new("measurement")
                .required(true)
                .num_args(1..)
                .value_parser(names.collect::<Vec<_>>())
                .help("what to measure"),
        )
        .args([
            option("json", "FILE", "write the results there, too; without a name, print nothing else")
                .num_args(0..=1)
                .default_missing_value("-")
                .value_parser(value_parser!(std::path::PathBuf)),
            option("seconds", "SECONDS", "how long each figure is measured in each round")
                .value_parser(value_parser!(f64)),
            option("rounds", "COUNT", "figures are the medians of so many rounds")
                .value_parser(value_parser!(usize)),
            Arg::new("quick")
                .long("quick")
                .action(ArgAction::SetTrue)
                .help("sizes that only show that it works"),
            Arg::new("full")
                .long("full")
                .action(ArgAction::SetTrue)
                .conflicts_with("quick")
                .help("growth: 10,000,000 finished and 1,000,000 pending tasks, a session open for 10 minutes"),
        ])
        .args(Sizes::NAMES.map(|(name, help)| {
            option(name, "COUNT", help).value_parser(value_parser!(u64).range(1..))
        }))
        .after_help(
            "Without DATABASE_URL it starts a Postgres of its own in a temporary folder; with it, it \
             makes and drops databases there. Use a release build.",
        )
}

/// Measures until it is done, or a signal comes.
pub(super) fn run(config: &Config, matches: &ArgMatches) -> Result<(), Fatal> {
    let names = matches.get_many::<String>("measurement").into_iter().flatten();
    let mut measurements: Vec<String> = names.cloned().collect();
    if measurements.iter().any(|name| name == "all") {
        measurements = MEASUREMENTS.map(str::to_owned).to_vec();
    }
    let mut sizes = if matches.get_flag("quick") {
        Sizes::QUICK
    } else if matches.get_flag("full") {
        Sizes::FULL
    } else {
        Sizes::USUAL
    };
    for (name, _) in Sizes::NAMES {
        if let Some(count) = matches.get_one(name) {
            sizes.set(name, *count);
        }
    }
    let options = Options {
        measurements,
        json: matches.get_one("json").cloned(),
        seconds: matches.get_one("seconds").copied(),
        rounds: matches.get_one("rounds").copied(),
        quick: matches.get_flag("quick"),
        sizes,
    };
    // One thread: the rest of the machine is for what is measured.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut signals = Signals::new()?;
        bench::run(config, &options, async { signals.next().await }).await
    })
}

/// A replica that ends with the benchmark.
pub(super) fn replica(config: &Config) -> Result<(), Fatal> {
    bench::end_with_parent();
    serve::serve(config)
}

/// The minimal server, which ends with the benchmark.
pub(super) fn minimal() -> Result<(), Fatal> {
    bench::end_with_parent();
    Ok(serve::runtime()?.block_on(bench::minimal())?)
}
