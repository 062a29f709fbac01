//! The user as which PostgreSQL's programs run.
//!
//! PostgreSQL refuses to run as root, and people try things out as root: its programs then run
//! as an unprivileged user, while Taskwire itself stays root.

use super::error::Error;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, chown, lchown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Users tried, in this order, when Taskwire runs as root.
const NAMES: [&str; 2] = ["postgres", "nobody"];

/// Environment variables that PostgreSQL's programs may see. Not the others: they can hold
/// secrets of the server, which an unprivileged user could read from its own processes, and
/// PGDATA, PGPORT and the like would change what the programs do.
const ENVIRONMENT: [&str; 4] = ["PATH", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"];

/// The user as which PostgreSQL's programs run.
#[derive(Clone, Debug)]
pub(super) struct RunAs {
    /// `None`: the user that runs Taskwire.
    other: Option<User>,
}

#[derive(Clone, Debug)]
struct User {
    name: String,
    uid: u32,
    gid: u32,
}

impl RunAs {
    /// The owner of `cluster` if there is one already, else the first unprivileged user found;
    /// the user itself if that is not root.
    pub(super) fn detect(cluster: &Path) -> Result<Self, Error> {
        if id(&["-u"])? != "0" {
            return Ok(Self { other: None });
        }
        if let Ok(metadata) = fs::metadata(cluster)
            && metadata.uid() != 0
        {
            let (uid, gid) = (metadata.uid(), metadata.gid());
            let name = id(&["-un", &uid.to_string()]).unwrap_or_else(|_| uid.to_string());
            return Ok(Self { other: Some(User { name, uid, gid }) });
        }
        let other = NAMES.iter().find_map(|name| {
            let uid = id(&["-u", name]).ok()?.parse().ok()?;
            let gid = id(&["-g", name]).ok()?.parse().ok()?;
            Some(User { name: (*name).to_owned(), uid, gid })
        });
        if other.is_none() {
            return Err(Error::new(
                "PostgreSQL refuses to run as root, and there is neither a user `postgres` nor \
                 `nobody` to run it as: run Taskwire as an ordinary user, or set DATABASE_URL.",
            ));
        }
        Ok(Self { other })
    }

    /// The name of the user, if it is another than the one that runs Taskwire.
    pub(super) fn name(&self) -> Option<&str> {
        self.other.as_ref().map(|user| user.name.as_str())
    }

    /// A command that runs as this user, in a folder it can certainly enter, in English (error
    /// texts are looked at), with none of the server's secrets.
    pub(super) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
        for name in ENVIRONMENT {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        if let Some(user) = &self.other {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    /// Whether this user gets into `folder`: tried out, since mode bits tell nothing of access
    /// lists, user namespaces and file systems that map users.
    pub(super) fn can_enter(&self, folder: &Path) -> bool {
        self.other.is_none()
            || self
                .command("/bin/sh")
                .args(["-c", r#"cd "$1""#, "sh"])
                .arg(folder)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success())
    }

    /// Makes this user the owner of a file or folder that we have just made.
    pub(super) fn own(&self, path: &Path) -> Result<(), Error> {
        match &self.other {
            None => Ok(()),
            Some(user) => chown(path, Some(user.uid), Some(user.gid))
                .map_err(|error| Error::io("hand over to another user", path, &error)),
        }
    }

    /// Makes this user the owner of everything in a folder that we have just made.
    pub(super) fn own_tree(&self, path: &Path) -> Result<(), Error> {
        let Some(user) = &self.other else {
            return Ok(());
        };
        let failed = |error| Error::io("hand over to another user", path, &error);
        lchown(path, Some(user.uid), Some(user.gid)).map_err(failed)?;
        if fs::symlink_metadata(path).map_err(failed)?.is_dir() {
            for entry in fs::read_dir(path).map_err(failed)? {
                self.own_tree(&entry.map_err(failed)?.path())?;
            }
        }
        Ok(())
    }
}

/// What `id` prints: the only way to ask for user ids that needs neither `unsafe` nor guesses
/// about /etc/passwd.
fn id(arguments: &[&str]) -> Result<String, Error> {
    let output = Command::new("id")
        .args(arguments)
        .output()
        .map_err(|error| Error::new(format!("Cannot run the command `id`: {error}.")))?;
    if !output.status.success() {
        return Err(Error::new(format!("`id {}` failed.", arguments.join(" "))));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
