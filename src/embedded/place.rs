//! Where a cluster lies: in its data folder, unless PostgreSQL's user cannot get there.

use super::error::Error;
use super::unprivileged::RunAs;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Where clusters go that cannot lie in their data folder.
const ELSEWHERE: &str = "/var/lib/taskwire";

/// How many folders of the same name in [`ELSEWHERE`] are tried.
const MOST_SUFFIXES: u32 = 1000;

/// For everybody to enter.
const OPEN_FOLDER: u32 = 0o755;

/// Where the cluster is or is to be: in the data folder, or where the link there leads.
pub(super) fn locate(data: &Path, user: &RunAs) -> Result<PathBuf, Error> {
    let path = data.join("postgres");
    if let Ok(target) = fs::read_link(&path) {
        return Ok(data.join(target));
    }
    if path.exists() || user.can_enter(data) {
        return Ok(path);
    }
    let cluster = make_elsewhere(data)?.join("postgres");
    match symlink(&cluster, &path) {
        Ok(()) => {
            tracing::info!(
                "the user {} as which PostgreSQL runs cannot enter {}: the database goes to {}",
                user.name().unwrap_or("unknown"),
                data.display(),
                cluster.display()
            );
            Ok(cluster)
        }
        // Another process was faster; ours is still empty.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            cluster.parent().map(fs::remove_dir);
            fs::read_link(&path).map_err(|error| Error::io("read the link", &path, &error))
        }
        Err(error) => Err(Error::io("create the link", &path, &error)),
    }
}

/// A new folder for the cluster that belongs to `data`. Never one that is there already: if the
/// data folder was deleted, its owner wants to begin afresh, and nothing of his is deleted here.
fn make_elsewhere(data: &Path) -> Result<PathBuf, Error> {
    let root = Path::new(ELSEWHERE);
    if !root.exists() {
        open_folder(root)
            .or_else(|error| if root.exists() { Ok(()) } else { Err(error) })
            .map_err(|error| Error::io("create the folder", root, &error))?;
    }
    let project = data.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let readable: String = project.chars().filter(char::is_ascii_alphanumeric).collect();
    let hash = fnv1a(data.as_os_str().as_encoded_bytes());
    for suffix in 1..MOST_SUFFIXES {
        let path = root.join(format!("{readable:.40}-{hash:016x}-{suffix}"));
        match open_folder(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io("create the folder", &path, &error)),
        }
    }
    Err(Error::new(format!("Too many forgotten clusters in {}: delete some.", root.display())))
}

/// Makes a folder that everybody can enter, whatever the umask.
fn open_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(OPEN_FOLDER).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(OPEN_FOLDER))
}

/// A hash that stays the same across versions of Rust, unlike the one of the standard library.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
