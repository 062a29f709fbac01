//! What a server does so that there is a guard, and with it a PostgreSQL.

use super::binaries::{Binaries, Found, Search, from_setting};
use super::download::Source;
use super::error::Error;
use super::folder::{Folder, Ready};
use super::guard::{BUSY, FAILED, READY};
use super::log::{Log, quote};
use super::{LONG_WAIT, Options, POLL, WAIT_LIMIT, blocking};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Command;
use tokio::time::{sleep, timeout};

/// How often a server looks whether there is still a guard.
const GUARD_INTERVAL: Duration = Duration::from_secs(2);

/// How long to wait after a guard could not be started.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);

/// Starts guards.
pub(super) struct Launcher {
    options: Options,
    folder: Arc<Folder>,
}

impl Launcher {
    pub(super) fn new(options: Options, folder: Arc<Folder>) -> Self {
        Self { options, folder }
    }

    /// Looks at the setting for the programs, needed or not: a wrong one shall show at once
    /// rather than some other day.
    pub(super) async fn check_setting(&self) -> Result<(), Error> {
        if self.options.postgres_bin.is_some() {
            self.find(Search::usual(self.folder.programs())).await?;
        }
        Ok(())
    }

    /// Waits until PostgreSQL accepts connections; starts a guard if there is none.
    pub(super) async fn ensure(&self) -> Result<Ready, Error> {
        let began = Instant::now();
        let mut said = false;
        while began.elapsed() < WAIT_LIMIT {
            if let Some(ready) = self.folder.ready()? {
                return Ok(ready);
            }
            if !self.folder.has_guard()? {
                self.launch().await?;
                continue;
            }
            if began.elapsed() > LONG_WAIT && !std::mem::replace(&mut said, true) {
                tracing::info!("waiting for PostgreSQL, which another process starts");
            }
            sleep(POLL).await;
        }
        Err(Error::new(format!(
            "PostgreSQL is not ready after {} minutes: see {}.",
            WAIT_LIMIT.as_secs() / 60,
            self.folder.log().display()
        )))
    }

    /// Starts another guard whenever there is none, as after it was killed. Without it the
    /// database goes on, but nothing would stop it, or start it again.
    pub(super) async fn watch(self) {
        loop {
            sleep(GUARD_INTERVAL).await;
            if self.folder.has_guard().unwrap_or(true) {
                continue;
            }
            tracing::warn!("the process that guards PostgreSQL is gone: starting another");
            if let Err(error) = self.ensure().await {
                tracing::error!("{error}");
                sleep(RETRY_INTERVAL).await;
            }
        }
    }

    /// Starts a guard and waits until it is ready, or has found that there is one.
    async fn launch(&self) -> Result<(), Error> {
        let binaries = self.binaries().await?;
        let cluster = self.folder.cluster();
        if self.folder.major()?.is_none() {
            tracing::info!("creating a database in {}", cluster.display());
        }
        tracing::info!(
            "starting PostgreSQL {} from {}, data in {}",
            binaries.version(),
            binaries.folder().display(),
            cluster.display()
        );
        match timeout(WAIT_LIMIT, self.run_guard(&binaries)).await {
            Ok(result) => result,
            Err(_) => Err(self.silent("has said nothing for too long")),
        }
    }

    async fn run_guard(&self, binaries: &Binaries) -> Result<(), Error> {
        let log = Log::new(self.folder.log());
        log.rotate();
        let exe = &self.options.guard_exe;
        let failed = |error| Error::io("run the guard of PostgreSQL,", exe, &error);
        let mut child = Command::new(std::path::absolute(exe).map_err(failed)?)
            .arg("postgres-guard")
            .arg("--data-dir")
            .arg(self.folder.data())
            .arg("--postgres-bin")
            .arg(binaries.folder())
            // Neither Ctrl-C in the server's terminal nor a busy folder is the guard's business.
            .process_group(0)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::from(log.open()?))
            .spawn()
            .map_err(failed)?;
        let Some(stdout) = child.stdout.take() else {
            return Err(self.silent("has no output"));
        };
        let mut stdout = BufReader::new(stdout);
        let mut word = String::new();
        stdout.read_line(&mut word).await.map_err(failed)?;
        match word.trim() {
            READY | BUSY => Ok(()),
            FAILED => {
                let mut sentence = String::new();
                stdout.read_to_string(&mut sentence).await.map_err(failed)?;
                Err(Error::new(sentence.trim()))
            }
            _ => {
                let status = child.wait().await.map_err(failed)?;
                Err(self.silent(&format!("ended before PostgreSQL was ready ({status})")))
            }
        }
    }

    fn silent(&self, what: &str) -> Error {
        let log = Log::new(self.folder.log());
        Error::new(format!(
            "The guard of PostgreSQL, {}, {what}. The end of {}:{}",
            self.options.guard_exe.display(),
            log.path().display(),
            quote(&log.since(0))
        ))
    }

    /// PostgreSQL's programs: those of the setting, else installed ones, else downloaded ones.
    async fn binaries(&self) -> Result<Binaries, Error> {
        if let Some(binaries) = self.find(Search::usual(self.folder.programs())).await? {
            return Ok(binaries);
        }
        Source::github().download(&self.folder, self.folder.major()?).await
    }

    async fn find(&self, search: Search) -> Result<Option<Binaries>, Error> {
        let (folder, setting) = (Arc::clone(&self.folder), self.options.postgres_bin.clone());
        blocking(move || {
            let major = folder.major()?;
            if let Some(setting) = setting {
                return from_setting(&setting, major, folder.user()).map(Some);
            }
            match (search.find(major, folder.user()), major) {
                (Found::Fitting(binaries), _) => Ok(Some(binaries)),
                (Found::OtherMajor(other), Some(major)) => Err(Error::new(format!(
                    "The database in {cluster} was made by PostgreSQL {major}, but only \
                     PostgreSQL {found} was found, in {bin}: install PostgreSQL {major} beside \
                     it, or set TASKWIRE_POSTGRES_BIN to the folder of its programs, or convert \
                     the database with pg_upgrade, or move that folder away to begin with an \
                     empty database.",
                    cluster = folder.cluster().display(),
                    found = other.version(),
                    bin = other.folder().display(),
                ))),
                _ => Ok(None),
            }
        })
        .await
    }
}
