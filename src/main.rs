//! The program `taskwire`.

use std::process::ExitCode;

fn main() -> ExitCode {
    taskwire::cli::run(std::env::args_os())
}
