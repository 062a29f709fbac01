//! The cluster: the files of the database, as made by `initdb`.

use super::binaries::Binaries;
use super::error::Error;
use super::folder::Folder;
use super::log::{Log, quote};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use uuid::Uuid;

/// Database user and database.
const NAME: &str = "taskwire";

/// What a new cluster's `postgresql.conf` gets on top. An operator may change it there; what must
/// not be changed is given on the command line instead.
const SETTINGS: &str = "
# Added by Taskwire when it made this cluster. Feel free to change what is in this file, except
# addresses, port and durability, which Taskwire gives on the command line.
max_connections = 200
log_line_prefix = '%m [%p] %a '
log_timezone = 'UTC'
";

/// Between the name of the cluster and a UUID in the name of an unfinished one.
const UNFINISHED: &str = ".new-";

/// Only for the owner, as PostgreSQL demands.
const PRIVATE_FOLDER: u32 = 0o700;
const SECRET: u32 = 0o600;

/// A cluster, and the programs to work on it. Only the guard has one.
#[derive(Clone, Debug)]
pub(super) struct Cluster {
    pub(super) folder: Folder,
    pub(super) binaries: Binaries,
    pub(super) log: Log,
}

impl Cluster {
    /// Makes the cluster if there is none, and sees to it that the password is known.
    pub(super) fn make_ready(&self) -> Result<(), Error> {
        self.remove_leftovers();
        if self.folder.major()?.is_none() {
            return self.make();
        }
        if self.folder.password().is_some() {
            return Ok(());
        }
        self.log.note("postgres.password is gone: setting a new password");
        let password = new_password();
        let sql = format!("ALTER ROLE {NAME} PASSWORD '{password}';\n");
        self.single_user(self.folder.cluster(), &sql)?;
        self.folder.set_password(&password)
    }

    /// The URL while the cluster listens at `port`.
    pub(super) fn url(&self, port: u16) -> Result<String, Error> {
        let password = self.folder.password().ok_or_else(|| {
            Error::new("The file postgres.password is gone: stop Taskwire and start it again.")
        })?;
        Ok(format!("postgres://{NAME}:{password}@127.0.0.1:{port}/{NAME}"))
    }

    /// The port of the last start.
    pub(super) fn last_port(&self) -> Option<u16> {
        let url = self.folder.last_url()?;
        url.trim().rsplit_once('/')?.0.rsplit_once(':')?.1.parse().ok()
    }

    /// Makes the cluster under another name and renames it when it is complete, so that a crash
    /// at any moment leaves either a complete one or none.
    fn make(&self) -> Result<(), Error> {
        let path = self.folder.cluster();
        let parent = path.parent().unwrap_or(path);
        fs::create_dir_all(parent).map_err(|error| Error::io("create", parent, &error))?;
        // Names of their own: an initdb whose guard was killed may still write to the former.
        let (new, secret) = (self.unfinished(), self.unfinished());
        let made = self.make_at(&new, &secret).and_then(|()| {
            fs::rename(&new, path)
                .and_then(|()| File::open(parent)?.sync_all())
                .map_err(|error| Error::io("put a new cluster at", path, &error))
        });
        self.remove_leftovers();
        made
    }

    /// A new name beside the cluster's: as that of the cluster, then a UUID.
    fn unfinished(&self) -> PathBuf {
        let mut name = self.folder.cluster().as_os_str().to_owned();
        name.push(format!("{UNFINISHED}{}", Uuid::new_v4().simple()));
        PathBuf::from(name)
    }

    /// Removes what unfinished attempts have left. What cannot be removed is only in the way.
    fn remove_leftovers(&self) {
        let cluster = self.folder.cluster();
        let entries = cluster.parent().and_then(|parent| fs::read_dir(parent).ok());
        for entry in entries.into_iter().flatten().flatten() {
            let path = entry.path();
            let suffix = path.as_os_str().as_encoded_bytes();
            let suffix = suffix.strip_prefix(cluster.as_os_str().as_encoded_bytes());
            let suffix = suffix.and_then(|suffix| suffix.strip_prefix(UNFINISHED.as_bytes()));
            if suffix.is_some_and(|uuid| Uuid::try_parse_ascii(uuid).is_ok()) {
                let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
            }
        }
    }

    fn make_at(&self, new: &Path, secret: &Path) -> Result<(), Error> {
        let user = self.folder.user();
        DirBuilder::new()
            .mode(PRIVATE_FOLDER)
            .create(new)
            .map_err(|error| Error::io("create the folder", new, &error))?;
        user.own(new)?;
        let password = new_password();
        // Not the file postgres.password itself: that one stays with the user of Taskwire.
        append(secret, &password).map_err(|error| Error::io("write", secret, &error))?;
        user.own(secret)?;
        let output = user
            .command(self.binaries.program("initdb"))
            .args(["--username", NAME, "--encoding=UTF8", "--locale=C", "--auth=scram-sha-256"])
            .arg("--pwfile")
            .arg(secret)
            .arg("--pgdata")
            .arg(new)
            .output();
        self.check("initdb", output)?;
        let settings = new.join("postgresql.conf");
        append(&settings, SETTINGS).map_err(|error| Error::io("write", &settings, &error))?;
        // Here rather than over a connection: so it belongs to what is complete or not there.
        self.single_user(new, &format!("CREATE DATABASE {NAME};\n"))?;
        self.folder.set_password(&password)
    }

    /// Runs SQL on a cluster that is not started.
    fn single_user(&self, path: &Path, sql: &str) -> Result<(), Error> {
        let child = self
            .folder
            .user()
            .command(self.binaries.program("postgres"))
            .args(["--single", "-c", "exit_on_error=on", "-D"])
            .arg(path)
            .arg("template1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let output = child.and_then(|mut child| {
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(sql.as_bytes())?;
            }
            child.wait_with_output()
        });
        self.check("postgres --single", output)
    }

    fn check(&self, program: &str, output: io::Result<Output>) -> Result<(), Error> {
        let output = output.map_err(|error| {
            let folder = self.binaries.folder().display();
            Error::new(format!("{program} in {folder} cannot be run: {error}."))
        })?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::new(format!(
            "{program} (PostgreSQL {}) could not set up the database in {} ({}):{}",
            self.binaries.version(),
            self.folder.cluster().display(),
            output.status,
            quote(&String::from_utf8_lossy(&output.stderr))
        )))
    }
}

/// Two random UUIDs, 244 random bits: letters and digits only, so it needs no escaping anywhere.
fn new_password() -> String {
    format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

fn append(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).mode(SECRET).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
