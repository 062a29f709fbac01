//! The guard: a small process that runs PostgreSQL for as long as somebody uses it.
//!
//! A process of its own, since a server that is killed cannot stop anything any more. It learns
//! by a file lock whether there are users; see [`super::folder`].

use super::binaries::Binaries;
use super::cluster::Cluster;
use super::error::Error;
use super::folder::Folder;
use super::log::Log;
use super::postmaster::Postmaster;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How often to look for users, and whether PostgreSQL still runs.
const POLL: Duration = Duration::from_millis(250);

/// How long to wait between attempts to start a PostgreSQL that died.
const START_AGAIN_INTERVAL: Duration = Duration::from_millis(500);

/// First words of the guard to the server that started it.
pub(super) const READY: &str = "ready";
pub(super) const BUSY: &str = "busy";
pub(super) const FAILED: &str = "failed";

/// What `postgres-guard` is told on its command line.
#[derive(Clone, Debug)]
pub struct GuardArgs {
    /// The data folder, as an absolute path (`--data-dir`).
    pub data_dir: PathBuf,
    /// The folder of PostgreSQL's programs, as an absolute path (`--postgres-bin`).
    pub postgres_bin: PathBuf,
}

/// Entry of the guard process: starts PostgreSQL, watches over it, and stops it when its last
/// user is gone. Blocks until then; returns the process's exit code.
#[must_use]
pub fn guard(args: GuardArgs) -> ExitCode {
    let GuardArgs { data_dir, postgres_bin } = args;
    match run(&data_dir, &postgres_bin) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(FAILED, &error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn run(data_dir: &Path, postgres_bin: &Path) -> Result<(), Error> {
    let folder = Folder::open(data_dir)?;
    let Some(mut lock) = folder.become_guard()? else {
        tell(BUSY, "");
        return Ok(());
    };
    let binaries = Binaries::probe(postgres_bin, folder.user()).map_err(|why| {
        Error::new(format!("PostgreSQL in {} is of no use: {why}.", postgres_bin.display()))
    })?;
    let users = folder.users()?;
    let log = Log::new(folder.log());
    let cluster = Cluster { folder, binaries, log };
    let mut postmaster = Postmaster::adopt_or_start(&cluster)
        .inspect_err(|error| cluster.log.note(&error.to_string()))?;
    let result = introduce(&cluster, &mut lock).and_then(|()| publish(&cluster, &postmaster));
    let ready = match result {
        Ok(ready) => ready,
        Err(error) => {
            postmaster.stop(&cluster)?;
            return Err(error);
        }
    };
    tell(READY, "");
    watch(&cluster, &mut postmaster, &users, ready);
    cluster.log.note("nobody uses PostgreSQL any more: stopping it");
    if let Err(error) = postmaster.stop(&cluster) {
        cluster.log.note(&error.to_string());
    }
    // In this order: whoever gets in as a user then finds nothing left of this guard.
    drop(lock);
    drop(users);
    Ok(())
}

/// Watches until there are no users, and locks new ones out.
fn watch(cluster: &Cluster, postmaster: &mut Postmaster, users: &File, ready: File) {
    let mut ready = Some(ready);
    let mut tried = None;
    loop {
        sleep(POLL);
        if users.try_lock().is_ok() {
            return;
        }
        if ready.is_some() && postmaster.is_running(cluster) {
            continue;
        }
        if ready.take().is_some() {
            cluster.log.note("PostgreSQL has ended by itself: starting it again");
        }
        if tried.is_some_and(|tried: Instant| tried.elapsed() < START_AGAIN_INTERVAL) {
            continue;
        }
        tried = Some(Instant::now());
        let started =
            if postmaster.is_running(cluster) { Ok(()) } else { postmaster.start_again(cluster) };
        match started.and_then(|()| publish(cluster, postmaster)) {
            Ok(published) => {
                cluster.log.note("PostgreSQL is ready again");
                ready = Some(published);
            }
            Err(error) => cluster.log.note(&error.to_string()),
        }
    }
}

/// Writes who the guard is into its lock file; shortened afterwards, so that it is never empty.
fn introduce(cluster: &Cluster, lock: &mut File) -> Result<(), Error> {
    let text = format!("{}\n{}\n", std::process::id(), cluster.binaries.version());
    let written = lock.write_all(text.as_bytes()).and_then(|()| lock.set_len(text.len() as u64));
    written.map_err(|error| Error::new(format!("Cannot write guard.lock: {error}.")))
}

fn publish(cluster: &Cluster, postmaster: &Postmaster) -> Result<File, Error> {
    cluster.folder.publish(&cluster.url(postmaster.port())?)
}

/// Tells the server that started the guard. It may be gone, which its lock tells soon enough.
fn tell(word: &str, text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{word}\n{text}").and_then(|()| stdout.flush());
}
