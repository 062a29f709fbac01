//! `taskwire serve` and `taskwire migrate`.

use super::{Fatal, welcome};
use crate::config::{Config, LogFormat, Secret};
use crate::embedded::{self, Embedded};
use crate::server::{self, Replica};
use crate::telemetry;

/// Serves until a signal.
pub(super) fn serve(config: &Config) -> Result<(), Fatal> {
    start_logging(config)?;
    runtime()?.block_on(async {
        let mut signals = Signals::new()?;
        let listener = server::bind(config.bind)?;
        let (own, url) = if let Some(url) = &config.database_url { (None, url.clone()) } else {
            let own = start_own_postgres(config).await?;
            let url = Secret::from(own.url());
            (Some(own), url)
        };
        let replica = Replica::start(config, &url, listener).await?;
        let address = replica.address;
        tracing::info!(%address, version = env!("CARGO_PKG_VERSION"), "serving on http://{address}");
        if config.log_format == LogFormat::Text {
            welcome::print(address, own.is_some().then_some(config.data_dir.as_path()));
        }
        let ended = replica.run_until(async || signals.next().await).await;
        if let Some(own) = own {
            own.stop().await;
        }
        Ok(ended?)
    })
}

/// Brings the schema up to date.
pub(super) fn migrate(config: &Config) -> Result<(), Fatal> {
    start_logging(config)?;
    let Some(url) = &config.database_url else {
        return Err(
            "set DATABASE_URL: without it, `taskwire serve` migrates its own Postgres itself"
                .into(),
        );
    };
    runtime()?.block_on(async {
        // As `serve` does: a pooler in transaction mode would lose the session's lock.
        let (_, options) = server::parse_urls(url, config.database_listen_url.as_ref())?;
        let applied = server::migrate_patiently(&options).await?;
        for name in &applied {
            tracing::info!("migration applied: {name}");
        }
        if applied.is_empty() {
            tracing::info!("the schema is up to date");
        }
        Ok(())
    })
}

async fn start_own_postgres(config: &Config) -> Result<Embedded, Fatal> {
    let own = Embedded::start(&embedded::Options {
        data_dir: config.data_dir.clone(),
        postgres_bin: config.postgres_bin.clone(),
        guard_exe: std::env::current_exe()?,
    })
    .await?;
    tracing::info!(
        version = own.version(),
        "no DATABASE_URL: the own Postgres runs, its data is in {}",
        config.data_dir.display()
    );
    Ok(own)
}

fn start_logging(config: &Config) -> Result<(), Fatal> {
    telemetry::init(config.log_format, &config.log_filter)
        .map_err(|error| format!("RUST_LOG is `{}`: {error}", config.log_filter).into())
}

pub(super) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

/// SIGTERM and SIGINT.
pub(super) struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
