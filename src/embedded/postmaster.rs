//! The running PostgreSQL.

use super::cluster::Cluster;
use super::error::Error;
use super::log::quote;
use super::pid_file::{self, PidFile};
use super::port;
use std::os::unix::process::{CommandExt, parent_id};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The longest a start may take. Much, since it may have to replay its journal first.
pub(super) const START_LIMIT: Duration = Duration::from_mins(5);

/// The longest each way of stopping may take.
const STOP_LIMIT: Duration = Duration::from_mins(1);

/// How long to try again where a former PostgreSQL is in the way that will be gone soon.
const RETRY_LIMIT: Duration = Duration::from_secs(20);

/// How long a PostgreSQL that says it is ready may refuse connections.
const REFUSING_LIMIT: Duration = Duration::from_secs(3);

/// How often to look while waiting.
const POLL: Duration = Duration::from_millis(20);

/// How often to ask `pg_ctl` about a PostgreSQL that is not our child.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// Settings that no file may change: durability is promised, and the rest is how it is found.
/// Messages are in English, since a few are looked for.
const FIXED: [&str; 6] = [
    "listen_addresses=127.0.0.1",
    // Paths of sockets can be too long, and nobody needs them.
    "unix_socket_directories=",
    "fsync=on",
    "synchronous_commit=on",
    "full_page_writes=on",
    "lc_messages=C",
];

/// A running PostgreSQL.
pub(super) struct Postmaster {
    /// `None` if it was started by a former guard.
    child: Option<Child>,
    pid: u32,
    port: u16,
    /// When `pg_ctl` was asked last, and what it said.
    asked: Instant,
    answer: bool,
}

/// Why a start failed.
struct Failure {
    reason: Reason,
    error: Error,
}

#[derive(PartialEq)]
enum Reason {
    /// Somebody else has the port.
    Port,
    /// Processes of a PostgreSQL that was killed are still ending.
    Leftover,
    Other,
}

impl Postmaster {
    /// The one that a former guard has left running; else a new one, preferably at the port of
    /// the last time.
    pub(super) fn adopt_or_start(cluster: &Cluster) -> Result<Self, Error> {
        if let Some(postmaster) = Self::adopt(cluster)? {
            return Ok(postmaster);
        }
        cluster.make_ready()?;
        let began = Instant::now();
        let mut port = match cluster.last_port() {
            Some(port) if port::is_free(port) => port,
            _ => port::find_free()?,
        };
        loop {
            match Self::try_start(cluster, port) {
                Ok(postmaster) => return Ok(postmaster),
                Err(Failure { reason, error })
                    if reason == Reason::Other || began.elapsed() > RETRY_LIMIT =>
                {
                    return Err(error);
                }
                Err(failure) if failure.reason == Reason::Port => port = port::find_free()?,
                Err(_) => sleep(STATUS_INTERVAL),
            }
        }
    }

    fn new(child: Option<Child>, pid: u32, port: u16) -> Self {
        Self { child, pid, port, asked: Instant::now(), answer: true }
    }

    /// Starts PostgreSQL again after it has died, at the same port: the servers know no other.
    pub(super) fn start_again(&mut self, cluster: &Cluster) -> Result<(), Error> {
        *self = Self::try_start(cluster, self.port).map_err(|failure| failure.error)?;
        Ok(())
    }

    /// Where it listens.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Whether it still runs.
    pub(super) fn is_running(&mut self, cluster: &Cluster) -> bool {
        if let Some(child) = &mut self.child {
            // A child whose state cannot be learnt is not one that has ended.
            return !matches!(child.try_wait(), Ok(Some(_)));
        }
        if self.asked.elapsed() > STATUS_INTERVAL {
            self.asked = Instant::now();
            self.answer = self.is_of(cluster) && pid_file::names_running(cluster);
        }
        self.answer
    }

    /// Whether the data folder still names this process, and not that of another guard after
    /// the folder was deleted and made again.
    fn is_of(&self, cluster: &Cluster) -> bool {
        PidFile::read(cluster).is_some_and(|file| file.pid == self.pid)
    }

    /// Stops it: clients are sent away, nothing is lost. Not by `pg_ctl`, which would take
    /// whatever is now in the data folder.
    pub(super) fn stop(&mut self, cluster: &Cluster) -> Result<(), Error> {
        if let Some(child) = &mut self.child
            && !cluster.folder.cluster().exists()
        {
            // Somebody has deleted the data: there is nothing left to lose.
            let _ = child.kill();
        }
        // PostgreSQL's "fast" and "immediate" shutdown.
        for signal in ["INT", "QUIT"] {
            if self.child.is_some() || self.is_of(cluster) {
                self.signal(signal);
            }
            let began = Instant::now();
            while began.elapsed() < STOP_LIMIT {
                if !self.is_running(cluster) {
                    return Ok(());
                }
                sleep(POLL);
            }
        }
        Err(Error::new(format!("PostgreSQL, process {}, does not stop.", self.pid)))
    }

    /// By the shell's `kill`: the standard library has only SIGKILL. Fails if the process has
    /// ended already; what counts is whether it runs.
    fn signal(&self, name: &str) {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", r#"kill -s "$1" "$2""#, "sh", name, &self.pid.to_string()]);
        let _ = command.stdin(Stdio::null()).output();
    }

    fn adopt(cluster: &Cluster) -> Result<Option<Self>, Error> {
        let began = Instant::now();
        let mut refusing = None;
        while let Some(file) = PidFile::read(cluster) {
            if !pid_file::names_running(cluster) {
                return Ok(None);
            }
            if file.is_stale() {
                // If it fails, PostgreSQL says in the log what is in its way.
                let _ = PidFile::replace_stale(cluster);
                return Ok(None);
            }
            if file.status == "ready" {
                if port::accepts(file.port) {
                    cluster.log.note(&format!("adopting PostgreSQL, process {}", file.pid));
                    return Ok(Some(Self::new(None, file.pid, file.port)));
                }
                // Not it then, but another process that has its number by now: PostgreSQL finds
                // out for itself.
                if refusing.get_or_insert_with(Instant::now).elapsed() > REFUSING_LIMIT {
                    return Ok(None);
                }
            }
            if began.elapsed() > START_LIMIT {
                return Err(Error::new(format!(
                    "A PostgreSQL (process {}) of this data folder has been {} for {} minutes: \
                     see {}.",
                    file.pid,
                    file.status,
                    START_LIMIT.as_secs() / 60,
                    cluster.log.path().display()
                )));
            }
            sleep(POLL);
        }
        Ok(None)
    }

    /// Starts it as a child rather than by `pg_ctl start`: so its end is noticed at once, it
    /// leaves no zombie that looks alive where nobody reaps orphans (in many containers), and it
    /// can be given the open log.
    fn try_start(cluster: &Cluster, port: u16) -> Result<Self, Failure> {
        let other = |error| Failure { reason: Reason::Other, error };
        let length = cluster.log.length();
        let log = cluster.log.open().map_err(other)?;
        let mut command = cluster.folder.user().command(cluster.binaries.program("postgres"));
        command.arg("-D").arg(cluster.folder.cluster()).args(["-c", &format!("port={port}")]);
        for setting in FIXED {
            command.args(["-c", setting]);
        }
        // By this PostgreSQL knows that a process number in a stale postmaster.pid that is now
        // the server's is not another PostgreSQL, which happens in containers.
        command.env("PG_GRANDPARENT_PID", parent_id().to_string());
        let child = log.try_clone().and_then(|copy| {
            command.stdout(Stdio::from(copy)).stderr(Stdio::from(log)).process_group(0).spawn()
        });
        let child = child.map_err(|error| {
            let folder = cluster.binaries.folder().display();
            other(Error::new(format!("postgres in {folder} cannot be run: {error}.")))
        })?;
        let pid = child.id();
        let mut postmaster = Self::new(Some(child), pid, port);
        let began = Instant::now();
        while postmaster.is_running(cluster) {
            if PidFile::read(cluster).is_some_and(|file| file.pid == pid && file.status == "ready")
            {
                return Ok(postmaster);
            }
            if began.elapsed() > START_LIMIT {
                let stopped =
                    postmaster.stop(cluster).map_or_else(|e| e.to_string(), |()| String::new());
                return Err(other(Error::new(format!(
                    "PostgreSQL did not get ready within {} minutes. {stopped}{}",
                    START_LIMIT.as_secs() / 60,
                    quote(&cluster.log.since(length))
                ))));
            }
            sleep(POLL);
        }
        let output = cluster.log.since(length);
        let error = Error::new(format!(
            "PostgreSQL {} ended while it started. The end of {}:{}",
            cluster.binaries.version(),
            cluster.log.path().display(),
            quote(&output)
        ));
        let reason = if output.contains("could not bind") {
            Reason::Port
        } else if output.contains("is still in use") || output.contains("already exists") {
            Reason::Leftover
        } else {
            Reason::Other
        };
        Err(Failure { reason, error })
    }
}
