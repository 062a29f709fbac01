//! PostgreSQL's programs: finding a folder that has them all, in a fitting version.

use super::error::Error;
use super::unprivileged::RunAs;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What must be there.
const PROGRAMS: [&str; 3] = ["initdb", "pg_ctl", "postgres"];

/// The oldest major version that Taskwire works with.
pub(super) const OLDEST_MAJOR: u32 = 14;

/// What to install, at the end of the sentence for those who have nothing.
pub(super) const INSTALL: &str = "install it (Debian/Ubuntu: apt-get install postgresql; \
    Fedora: dnf install postgresql-server; macOS: brew install postgresql), or set DATABASE_URL \
    to a server of yours, or TASKWIRE_POSTGRES_BIN to the folder of its programs";

/// Folders whose subfolders that begin with a prefix have PostgreSQL in `bin`, one per version.
const ROOTS: [(&str, &str); 4] = [
    ("/usr/lib/postgresql", ""),
    ("/opt/homebrew/opt", "postgresql"),
    ("/usr/local/opt", "postgresql"),
    ("/usr", "pgsql-"),
];

/// A folder with PostgreSQL's programs.
#[derive(Clone, Debug)]
pub(super) struct Binaries {
    folder: PathBuf,
    major: u32,
    version: String,
}

/// Where to look.
#[derive(Clone, Debug)]
pub(super) struct Search {
    /// A list of folders, as in the variable PATH.
    pub(super) path: Option<OsString>,
    /// Folders with a folder per version, and how the names of those begin.
    pub(super) roots: Vec<(PathBuf, String)>,
    /// Whether to ask the program `pg_config`.
    pub(super) ask_pg_config: bool,
}

/// What was found.
#[derive(Debug)]
pub(super) enum Found {
    Fitting(Binaries),
    /// Only other major versions than the one that was asked for: the first of them.
    OtherMajor(Binaries),
    Nothing,
}

impl Binaries {
    /// The programs in `folder`, or why they are of no use, as the end of a sentence. They are
    /// run to learn their version: this shows as well that `user` can run them.
    pub(super) fn probe(folder: &Path, user: &RunAs) -> Result<Self, String> {
        if !folder.is_dir() {
            return Err("there is no such folder".to_owned());
        }
        let missing: Vec<&str> =
            PROGRAMS.into_iter().filter(|name| !folder.join(name).is_file()).collect();
        if !missing.is_empty() {
            return Err(format!("that folder lacks {}", missing.join(" and ")));
        }
        let versions = PROGRAMS.map(|name| version(&folder.join(name), user));
        let [initdb, pg_ctl, postgres] = versions;
        let (initdb, pg_ctl, postgres) = (initdb?, pg_ctl?, postgres?);
        if initdb != postgres || pg_ctl != postgres {
            return Err(format!(
                "its programs are of different versions (initdb {initdb}, pg_ctl {pg_ctl}, \
                 postgres {postgres})"
            ));
        }
        let digits: String = postgres.chars().take_while(char::is_ascii_digit).collect();
        let major = digits.parse().map_err(|_| format!("its version {postgres} is unknown"))?;
        if major < OLDEST_MAJOR {
            return Err(format!("its version {postgres} is older than {OLDEST_MAJOR}"));
        }
        Ok(Self { folder: folder.to_owned(), major, version: postgres })
    }

    /// The path of a program.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The folder of the programs.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The major version, as in 15.
    pub(super) fn major(&self) -> u32 {
        self.major
    }

    /// The version, as in "15.18".
    pub(super) fn version(&self) -> &str {
        &self.version
    }
}

impl Search {
    /// Where PostgreSQL is on the systems we know, and where downloads go.
    pub(super) fn usual(downloads: &Path) -> Self {
        let mut roots: Vec<(PathBuf, String)> = ROOTS
            .into_iter()
            .map(|(root, prefix)| (PathBuf::from(root), prefix.to_owned()))
            .collect();
        roots.push((downloads.to_owned(), super::download::PREFIX.to_owned()));
        Self { path: std::env::var_os("PATH"), roots, ask_pg_config: true }
    }

    /// The first fitting folder; `major` is that of an existing cluster.
    pub(super) fn find(&self, major: Option<u32>, user: &RunAs) -> Found {
        let mut other = None;
        for folder in self.candidates() {
            let Ok(binaries) = Binaries::probe(&folder, user) else {
                continue;
            };
            if major.is_none_or(|major| major == binaries.major) {
                return Found::Fitting(binaries);
            }
            other.get_or_insert(binaries);
        }
        other.map_or(Found::Nothing, Found::OtherMajor)
    }

    fn candidates(&self) -> impl Iterator<Item = PathBuf> {
        let path = self.path.iter().flat_map(std::env::split_paths);
        let roots = self.roots.iter().flat_map(|(root, prefix)| newest_first(root, prefix));
        // Asked last, and only if nothing else fits.
        let config = std::iter::once(self.ask_pg_config).filter_map(|ask| {
            let output = ask.then(|| Command::new("pg_config").arg("--bindir").output())?.ok()?;
            Some(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
        });
        path.chain(roots).chain(config).filter(|folder| folder.is_absolute())
    }
}

/// The folders `bin` below those of `root` whose names begin with `prefix`, newest version first.
fn newest_first(root: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut names: Vec<String> = fs::read_dir(root)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort_by_cached_key(|name| {
        let numbers = name.split(|c: char| !c.is_ascii_digit());
        std::cmp::Reverse(numbers.filter_map(|part| part.parse().ok()).collect::<Vec<u64>>())
    });
    names.iter().map(|name| root.join(name).join("bin")).collect()
}

/// The version a program says it has: the third word of "postgres (PostgreSQL) 15.18 (Debian …".
fn version(program: &Path, user: &RunAs) -> Result<String, String> {
    let output = user.command(program).arg("--version").output().map_err(|error| {
        let name = user.name().map(|name| format!(" as the user {name}")).unwrap_or_default();
        format!("{} cannot be run{name} ({error})", program.display())
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().nth(2).map(str::to_owned);
    version.ok_or_else(|| {
        let said = String::from_utf8_lossy(&output.stderr);
        format!("{} does not tell its version: {}", program.display(), said.trim())
    })
}

/// The folder that the setting names, which is never passed over.
pub(super) fn from_setting(
    folder: &Path,
    major: Option<u32>,
    user: &RunAs,
) -> Result<Binaries, Error> {
    let wrong = |why: &str| {
        let version =
            major.map_or_else(|| format!("{OLDEST_MAJOR} or newer"), |major| format!("{major}"));
        Error::new(format!(
            "TASKWIRE_POSTGRES_BIN is {}, but {why}: it must be a folder with initdb, pg_ctl and \
             postgres of version {version}.",
            folder.display()
        ))
    };
    // PostgreSQL's programs are started in another folder than this process.
    let absolute = std::path::absolute(folder).map_err(|error| wrong(&error.to_string()))?;
    let binaries = Binaries::probe(&absolute, user).map_err(|why| wrong(&why))?;
    if major.is_some_and(|major| major != binaries.major) {
        let version = &binaries.version;
        return Err(wrong(&format!(
            "that is PostgreSQL {version}, which did not make the database"
        )));
    }
    Ok(binaries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_version_comes_first() {
        let root = std::env::temp_dir().join(format!("taskwire-roots-{}", std::process::id()));
        for name in ["postgresql@9", "postgresql@17", "postgresql@16.4", "postgresql", "other"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        let found = newest_first(&root, "postgresql");
        let names: Vec<_> = found
            .iter()
            .map(|path| path.strip_prefix(&root).unwrap().to_string_lossy().into_owned())
            .collect();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(
            names,
            ["postgresql@17/bin", "postgresql@16.4/bin", "postgresql@9/bin", "postgresql/bin"]
        );
    }
}
