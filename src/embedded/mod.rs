//! Taskwire's own PostgreSQL, for when no `DATABASE_URL` is given.
//!
//! Each server holds a lock as a user of the cluster; a guard process, started by whichever
//! server finds none, runs PostgreSQL for as long as there are users.

mod binaries;
mod cluster;
mod download;
mod error;
mod folder;
mod guard;
mod launcher;
mod log;
mod pid_file;
mod place;
mod port;
mod postmaster;
mod unprivileged;

pub use error::Error;
pub use guard::{GuardArgs, guard};

use folder::{Folder, Ready};
use launcher::Launcher;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;

/// How often to look while waiting for another process.
const POLL: Duration = Duration::from_millis(50);

/// The longest to wait for another process to start or to stop PostgreSQL.
const WAIT_LIMIT: Duration = Duration::from_mins(10);

/// After this long, a wait is worth a line in the log.
const LONG_WAIT: Duration = Duration::from_secs(2);

/// How long [`Embedded::stop`] waits to see whether the guard begins to stop PostgreSQL.
const NOTICE_LIMIT: Duration = Duration::from_secs(1);

/// The longest [`Embedded::stop`] waits for PostgreSQL to stop.
const STOP_LIMIT: Duration = Duration::from_mins(1);

/// What to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder that holds everything: `.taskwire` by default.
    pub data_dir: PathBuf,
    /// The setting `TASKWIRE_POSTGRES_BIN`: the folder of PostgreSQL's programs.
    pub postgres_bin: Option<PathBuf>,
    /// An executable that understands `postgres-guard --data-dir … --postgres-bin …`: the
    /// server's own.
    pub guard_exe: PathBuf,
}

/// A running PostgreSQL. It runs until the last of its users, in whichever process, drops this.
#[derive(Debug)]
pub struct Embedded {
    url: String,
    version: String,
    folder: Arc<Folder>,
    /// Keeps the guard from stopping PostgreSQL; the kernel drops it if this process dies.
    lock: File,
    watch: JoinHandle<()>,
}

impl Embedded {
    /// Starts PostgreSQL, or joins the one that already runs for this data folder.
    ///
    /// # Errors
    ///
    /// If there is no PostgreSQL on this machine and none can be downloaded, or if it cannot be
    /// started; the error is a sentence for a person.
    pub async fn start(options: &Options) -> Result<Self, Error> {
        let data = options.data_dir.clone();
        let folder = Arc::new(blocking(move || Folder::open(&data)).await?);
        let lock = join(&folder).await?;
        let launcher = Launcher::new(options.clone(), Arc::clone(&folder));
        launcher.check_setting().await?;
        let Ready { url, version } = launcher.ensure().await?;
        let watch = tokio::spawn(launcher.watch());
        Ok(Self { url, version, folder, lock, watch })
    }

    /// The complete URL of the database, with the password.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The version of PostgreSQL, as in "15.18".
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Releases the cluster as dropping does, and if this was its last user, waits until
    /// PostgreSQL has stopped. For a server that is the first process of a container: with its
    /// end everything else is killed.
    pub async fn stop(self) {
        let folder = Arc::clone(&self.folder);
        drop(self);
        let began = Instant::now();
        while began.elapsed() < STOP_LIMIT && folder.has_guard().unwrap_or(false) {
            let in_use = folder.join().ok().flatten().is_some();
            if in_use && began.elapsed() > NOTICE_LIMIT {
                return;
            }
            sleep(POLL).await;
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.watch.abort();
        // Closing would do, but not while a child process that was just forked has a copy.
        let _ = self.lock.unlock();
    }
}

/// Becomes a user of the cluster, as soon as no guard is about to stop it.
async fn join(folder: &Folder) -> Result<File, Error> {
    let began = Instant::now();
    let mut said = false;
    while began.elapsed() < WAIT_LIMIT {
        if let Some(lock) = folder.join()? {
            return Ok(lock);
        }
        if began.elapsed() > LONG_WAIT && !std::mem::replace(&mut said, true) {
            tracing::info!("waiting for the PostgreSQL of the last run to stop");
        }
        sleep(POLL).await;
    }
    Err(Error::new(format!(
        "The PostgreSQL of the last run has not stopped for {} minutes: see {}.",
        WAIT_LIMIT.as_secs() / 60,
        folder.log().display()
    )))
}

/// Runs something that blocks for a while, such as other programs.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    spawn_blocking(work).await.map_err(|error| Error::new(format!("A bug: {error}.")))?
}
