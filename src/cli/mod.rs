//! The command line: `serve` (the default), `migrate`, `bench`, and the guard of the own Postgres.

mod bench;
mod serve;
mod welcome;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command};

use crate::config::{self, Config, SETTINGS};
use crate::embedded;
use crate::store::chain;

/// Runs the program with these arguments, its name first.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let result = match matches.subcommand() {
        Some(("postgres-guard", guard)) => return embedded::guard(guard_args(guard)),
        Some(("migrate", options)) => read(options).and_then(|config| serve::migrate(&config)),
        Some(("bench", options)) => {
            read(&ArgMatches::default()).and_then(|config| bench::run(&config, options))
        }
        Some(("bench-replica", options)) => {
            read(options).and_then(|config| bench::replica(&config))
        }
        Some(("bench-minimal", _)) => bench::minimal(),
        Some(("serve", options)) => read(options).and_then(|config| serve::serve(&config)),
        _ => read(&ArgMatches::default()).and_then(|config| serve::serve(&config)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

/// An error that ends the program.
type Fatal = Box<dyn std::error::Error + Send + Sync>;

#[expect(clippy::print_stderr, reason = "the last words of a program that could not start")]
fn complain(error: &(dyn std::error::Error + 'static)) {
    eprintln!("taskwire: {}", chain(error));
}

fn command() -> Command {
    let settings = || {
        SETTINGS.iter().map(|setting| {
            Arg::new(setting.env)
                .long(setting.flag)
                .value_name(setting.value)
                .help(format!("{} ({})", setting.help, setting.env))
        })
    };
    Command::new("taskwire")
        .version(env!("CARGO_PKG_VERSION"))
        .args_override_self(true)
        .about("A task server that pushes work to workers over Server-Sent Events and keeps all of its truth in Postgres.")
        .after_help(
            "Without a command it serves. Every setting is an environment variable (a .env file is \
             read) or a flag of `serve`; see `taskwire serve --help`. RUST_LOG chooses log lines.",
        )
        .subcommand(
            Command::new("serve").about("Serve; without DATABASE_URL, on a Postgres of its own").args(settings()),
        )
        .subcommand(
            Command::new("migrate")
                .about("Bring the schema of DATABASE_URL up to date, and stop (`serve` does so itself)")
                .args(settings().filter(|arg| arg.get_id() == "DATABASE_URL")),
        )
        .subcommand(bench::command())
        .subcommand(Command::new("bench-replica").hide(true).args(settings()))
        .subcommand(Command::new("bench-minimal").hide(true))
        .subcommand(
            Command::new("postgres-guard").hide(true).args([
                Arg::new("data-dir").long("data-dir").required(true),
                Arg::new("postgres-bin").long("postgres-bin").required(true),
            ]),
        )
}

/// Flags before environment before `.env`.
fn read(options: &ArgMatches) -> Result<Config, Fatal> {
    let environment = config::environment()?;
    let flag = |name: &str| options.try_get_one::<String>(name).ok().flatten().cloned();
    Ok(Config::read(|name| flag(name).or_else(|| environment(name)))?)
}

fn guard_args(options: &ArgMatches) -> embedded::GuardArgs {
    let path = |name: &str| options.get_one::<String>(name).map(PathBuf::from).unwrap_or_default();
    embedded::GuardArgs { data_dir: path("data-dir"), postgres_bin: path("postgres-bin") }
}
