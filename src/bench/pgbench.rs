//! pgbench, which measures what Postgres does without us.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use super::Failure;
use super::ground::{Database, Ground};

/// Its threads: it shares the machine with Postgres.
const THREADS: u32 = 2;
/// Transactions of each client in a run of less than a second.
const FEW_TRANSACTIONS: u32 = 20;

/// The program, and whose password it needs.
#[derive(Clone, Debug)]
pub(super) struct Pgbench {
    program: PathBuf,
    password: Option<String>,
    pub(super) version: String,
}

/// What one run of it measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub(super) per_second: f64,
    pub(super) latency_ms: f64,
}

/// How long a run is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Length {
    Seconds(f64),
    /// Of each client.
    Transactions(u64),
}

impl Pgbench {
    /// Finds it where PostgreSQL's programs are.
    pub(super) async fn find(folder: Option<&Path>, url: &str) -> Option<Self> {
        let mut places: Vec<PathBuf> = folder.into_iter().map(Path::to_owned).collect();
        let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
            .collect();
        versions.sort();
        places.extend(versions.into_iter().rev());
        let programs = places.into_iter().map(|place| place.join("pgbench"));
        for program in programs.chain(["pgbench".into()]) {
            let Ok(output) = Command::new(&program).arg("--version").output().await else {
                continue;
            };
            if output.status.success() {
                let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                return Some(Self { program, password: password(url), version });
            }
        }
        None
    }

    /// Runs a script with so many clients, each statement prepared once.
    pub(super) async fn run(
        &self,
        ground: &Ground,
        database: &Database,
        script: &str,
        clients: u32,
        length: Length,
    ) -> Result<Pace, Failure> {
        let file = ground.folder().join("pgbench.sql");
        fs::write(&file, script)?;
        let mut command = Command::new(&self.program);
        command
            .args(["--no-vacuum", "--protocol=prepared", "--define=n=0"])
            .arg(format!("--client={clients}"))
            .arg(format!("--jobs={}", THREADS.min(clients)))
            .arg(format!("--file={}", file.display()));
        match length {
            // It only knows whole seconds.
            Length::Seconds(seconds) if seconds < 1.0 => {
                command.arg(format!("--transactions={FEW_TRANSACTIONS}"))
            }
            Length::Seconds(seconds) => command.arg(format!("--time={seconds:.0}")),
            Length::Transactions(count) => command.arg(format!("--transactions={count}")),
        };
        command
            .arg(for_libpq(&database.url()))
            .envs(self.password.as_ref().map(|password| ("PGPASSWORD", password)))
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = command.output().await?;
        let said = String::from_utf8_lossy(&output.stdout);
        let number_after = |word: &str| {
            let rest = said.lines().find_map(|line| line.strip_prefix(word))?;
            rest.split_whitespace().next()?.parse::<f64>().ok()
        };
        match (number_after("tps = "), number_after("latency average = ")) {
            (Some(per_second), Some(latency_ms)) if output.status.success() => {
                Ok(Pace { per_second, latency_ms })
            }
            _ => Err(format!("pgbench: {said}{}", String::from_utf8_lossy(&output.stderr)).into()),
        }
    }
}

/// The part between scheme and host, when there is one, and what stands around it.
fn parts(url: &str) -> Option<(&str, &str, &str)> {
    let (scheme, rest) = url.split_once("://")?;
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let at = rest[..end].rfind('@')?;
    Some((scheme, &rest[..at], &rest[at + 1..]))
}

/// The URL as libpq takes it, without what only sqlx knows, and without the password: on the command line
/// everybody on the machine can read it.
fn for_libpq(url: &str) -> String {
    let (url, query) = url.split_once('?').unwrap_or((url, ""));
    let known: Vec<_> =
        query.split('&').filter(|pair| !pair.starts_with("statement-cache-capacity=")).collect();
    let url = match parts(url) {
        Some((scheme, user, rest)) => {
            let user = user.split_once(':').map_or(user, |(name, _)| name);
            format!("{scheme}://{user}@{rest}")
        }
        None => url.to_owned(),
    };
    let query = known.join("&");
    if query.is_empty() { url } else { format!("{url}?{query}") }
}

fn password(url: &str) -> Option<String> {
    let (_, user, _) = parts(url)?;
    let mut bytes = user.split_once(':')?.1.bytes();
    let mut plain = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digits = [bytes.next()?, bytes.next()?];
            plain.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            plain.push(byte);
        }
    }
    String::from_utf8(plain).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_goes_by_the_environment() {
        let url = "postgres://me:a%40b@db:5432/x?sslmode=require&statement-cache-capacity=100";
        assert_eq!(for_libpq(url), "postgres://me@db:5432/x?sslmode=require");
        assert_eq!(password(url).as_deref(), Some("a@b"));
        assert_eq!(for_libpq("postgres://db/x"), "postgres://db/x");
        assert_eq!((password("postgres://me@db/x"), password("postgres://db/x")), (None, None));
    }
}
