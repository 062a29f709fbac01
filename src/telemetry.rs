//! Logs: text for people by default, JSON by setting, on standard error.

use tracing_subscriber::filter::{ParseError, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::config::LogFormat;

/// Turns logging on, once per process.
pub fn init(format: LogFormat, filter: &str) -> Result<(), ParseError> {
    let filter: Targets = filter.parse()?;
    // The libraries' own information is noise unless somebody asks for it by name.
    let has = |name: &str| filter.iter().any(|(target, _)| target == name);
    let filter = ["sqlx", "refinery_core"]
        .into_iter()
        .filter(|name| !has(name))
        .fold(filter.clone(), |filter, name| filter.with_target(name, tracing::Level::WARN));
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(filter)).init();
    Ok(())
}

fn is_terminal() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stderr())
}
