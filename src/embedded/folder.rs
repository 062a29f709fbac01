//! The data folder: where everything lies, and the locks by which processes know of each other.
//!
//! Locks are file locks, since the kernel drops them when their holder dies, however it dies:
//!
//! * `users.lock`, shared: held by each process that uses the cluster; exclusively: by the guard
//!   while it stops the cluster, so that nobody joins one that is about to go.
//! * `guard.lock`, exclusively: held by the guard. Its text (process id, PostgreSQL's version)
//!   is valid while `url` is locked.
//! * `url`, exclusively: held by the guard while the cluster accepts connections at that URL.

use super::error::Error;
use super::place;
use super::unprivileged::RunAs;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Only for its owner.
const SECRET: u32 = 0o600;

/// A data folder.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    data: PathBuf,
    cluster: PathBuf,
    programs: PathBuf,
    user: RunAs,
}

/// A cluster that accepts connections.
pub(super) struct Ready {
    pub(super) url: String,
    pub(super) version: String,
}

impl Folder {
    /// Opens the data folder, which is made if it is not there.
    pub(super) fn open(data: &Path) -> Result<Self, Error> {
        let made = fs::create_dir_all(data).and_then(|()| fs::canonicalize(data));
        let data = made.map_err(|error| Error::io("create the data folder", data, &error))?;
        let user = RunAs::detect(&data.join("postgres"))?;
        let cluster = place::locate(&data, &user)?;
        let parent = cluster.parent().unwrap_or(&data);
        if parent.exists() && !user.can_enter(parent) {
            return Err(Error::new(format!(
                "PostgreSQL refuses to run as root, and the user {} as which it runs instead \
                 cannot enter {}: allow that (chmod o+x, for each folder on the way), run \
                 Taskwire as an ordinary user, or set DATABASE_URL.",
                user.name().unwrap_or("unknown"),
                parent.display()
            )));
        }
        let programs = if user.can_enter(&data) { &data } else { parent }.to_owned();
        Ok(Self { data, cluster, programs, user })
    }

    /// The cluster, PGDATA; no symbolic link.
    pub(super) fn cluster(&self) -> &Path {
        &self.cluster
    }

    /// The folder of downloaded PostgreSQL programs.
    pub(super) fn programs(&self) -> &Path {
        &self.programs
    }

    /// The user as which PostgreSQL's programs run.
    pub(super) fn user(&self) -> &RunAs {
        &self.user
    }

    /// The data folder itself, as an absolute path.
    pub(super) fn data(&self) -> &Path {
        &self.data
    }

    /// What PostgreSQL and the guard write.
    pub(super) fn log(&self) -> PathBuf {
        self.data.join("postgres.log")
    }

    /// The major version the cluster was made with; `None` if there is no cluster yet.
    pub(super) fn major(&self) -> Result<Option<u32>, Error> {
        let path = self.cluster.join("PG_VERSION");
        match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map(Some).map_err(|_| {
                Error::new(format!("{} does not hold a version of PostgreSQL.", path.display()))
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", &path, &error)),
        }
    }

    /// The URL of the cluster while it accepts connections, watched over by a guard.
    pub(super) fn ready(&self) -> Result<Option<Ready>, Error> {
        let path = self.data.join("url");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("open", &path, &error)),
        };
        if is_free(&file, &path)? {
            return Ok(None);
        }
        // Read through the open file: the path may lead to a newer one by now.
        let url = io::read_to_string(file).map_err(|error| Error::io("read", &path, &error))?;
        let path = self.data.join("guard.lock");
        let text = fs::read_to_string(&path).map_err(|error| Error::io("read", &path, &error))?;
        let version = text.lines().nth(1).unwrap_or("unknown").to_owned();
        Ok(Some(Ready { url: url.trim().to_owned(), version }))
    }

    /// The URL of the last start, whether it still runs or not.
    pub(super) fn last_url(&self) -> Option<String> {
        fs::read_to_string(self.data.join("url")).ok()
    }

    /// Writes `url` and holds it locked: the cluster is ready until the file is dropped.
    pub(super) fn publish(&self, url: &str) -> Result<File, Error> {
        let (path, new) = (self.data.join("url"), self.data.join("url.new"));
        let written = write_secret(&new, &format!("{url}\n")).and_then(|file| {
            file.lock()?;
            fs::rename(&new, &path)?;
            Ok(file)
        });
        written.map_err(|error| Error::io("write", &path, &error))
    }

    /// The password of the database user, if there is one.
    pub(super) fn password(&self) -> Option<String> {
        let text = fs::read_to_string(self.data.join("postgres.password")).ok()?;
        Some(text.trim().to_owned()).filter(|password| !password.is_empty())
    }

    /// Stores the password of the database user.
    pub(super) fn set_password(&self, password: &str) -> Result<(), Error> {
        let path = self.data.join("postgres.password");
        let new = self.data.join("postgres.password.new");
        write_secret(&new, &format!("{password}\n"))
            .and_then(|_| fs::rename(&new, &path))
            .map_err(|error| Error::io("write", &path, &error))
    }

    /// Joins the users of the cluster; `None` while the guard is stopping it.
    pub(super) fn join(&self) -> Result<Option<File>, Error> {
        let (file, path) = self.open_lock("users.lock")?;
        let attempt = file.try_lock_shared();
        taken(attempt, file, &path)
    }

    /// The lock of the users, not taken. The guard keeps it open: so it learns that nobody is
    /// left even if the data folder has been deleted.
    pub(super) fn users(&self) -> Result<File, Error> {
        Ok(self.open_lock("users.lock")?.0)
    }

    /// Becomes the guard; `None` if there is one.
    pub(super) fn become_guard(&self) -> Result<Option<File>, Error> {
        let (file, path) = self.open_lock("guard.lock")?;
        let attempt = file.try_lock();
        taken(attempt, file, &path)
    }

    /// Whether a guard is there, ready or not.
    pub(super) fn has_guard(&self) -> Result<bool, Error> {
        let (file, path) = self.open_lock("guard.lock")?;
        Ok(!is_free(&file, &path)?)
    }

    /// Becomes the one process that downloads; `None` if there is one.
    pub(super) fn become_downloader(&self) -> Result<Option<File>, Error> {
        let (file, path) = self.open_lock("download.lock")?;
        let attempt = file.try_lock();
        taken(attempt, file, &path)
    }

    fn open_lock(&self, name: &str) -> Result<(File, PathBuf), Error> {
        let path = self.data.join(name);
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| Error::io("open", &path, &error))?;
        Ok((file, path))
    }
}

/// Writes a file that only its owner can read, and to disk, before it gets its final name.
fn write_secret(path: &Path, text: &str) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file =
        OpenOptions::new().read(true).write(true).create_new(true).mode(SECRET).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    Ok(file)
}

fn taken(
    attempt: Result<(), TryLockError>,
    file: File,
    path: &Path,
) -> Result<Option<File>, Error> {
    match attempt {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", path, &error)),
    }
}

/// Whether nobody holds the file exclusively. Asked with a shared lock, so that those who ask do
/// not see each other.
fn is_free(file: &File, path: &Path) -> Result<bool, Error> {
    match file.try_lock_shared() {
        Ok(()) => file.unlock().map(|()| true).map_err(|error| Error::io("unlock", path, &error)),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", path, &error)),
    }
}
