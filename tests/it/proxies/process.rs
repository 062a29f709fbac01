//! A real nginx or HAProxy, as an unprivileged process in a folder of its own.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::support::{eventually, http_client, programs};

/// Ports below those that the kernel takes for outgoing connections: a port that is given up and
/// taken again, as by a replica that restarts, is not somebody's in between.
const PORTS: std::ops::Range<u16> = 12_000..32_000;
/// `nobody` and `nogroup` on Debian: who the program is when the tests run as root.
const NOBODY: u32 = 65_534;
/// A port may be taken between its choice and the program's start.
const STARTS_MAX: usize = 5;
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Nginx,
    Haproxy,
}

/// A running one, ended when dropped.
pub struct Process {
    pub url: String,
    kind: Kind,
    child: Child,
    folder: PathBuf,
}

/// A free port of loopback.
pub fn free_port() -> u16 {
    let count = u32::from(PORTS.end - PORTS.start);
    loop {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Test processes at the same time begin at different ports.
        let offset = (std::process::id().wrapping_mul(97) + number) % count;
        let port = PORTS.start + u16::try_from(offset).unwrap_or_default();
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

impl Kind {
    /// Where it is; `None`: the test is to be skipped.
    pub fn find(self) -> Option<PathBuf> {
        programs::find(match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
        })
    }
}

impl Process {
    /// Starts it with the configuration that `write` makes for a port and a folder.
    pub async fn start(kind: Kind, write: impl Fn(u16, &Path) -> String) -> Option<Self> {
        let program = kind.find()?;
        for _ in 0..STARTS_MAX {
            let port = free_port();
            let folder = folder();
            fs::write(folder.join("config"), write(port, &folder)).unwrap();
            let log = fs::File::create(folder.join("log")).unwrap();
            let child = command(kind, &program, &folder)
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .expect("it starts");
            let url = format!("http://127.0.0.1:{port}");
            let mut process = Self { url, kind, child, folder };
            if process.serves().await {
                return Some(process);
            }
            assert!(process.log().contains("in use"), "{kind:?}: {}", process.log());
        }
        panic!("{kind:?} found no port");
    }

    /// Whether it serves; not when it has ended instead.
    async fn serves(&mut self) -> bool {
        let client = http_client().build().unwrap();
        eventually("the proxy answers from a replica", || {
            let has_ended = self.child.try_wait().expect("the child can be asked").is_some();
            let request = client.get(format!("{}/readyz", self.url)).send();
            async move {
                if has_ended {
                    return Some(false);
                }
                (request.await.ok()?.status() == 200).then_some(true)
            }
        })
        .await
    }

    /// What it said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Has it read its configuration anew, in mid-stream: new processes take over, the old ones end
    /// with their connections.
    pub fn reload(&self) {
        let signal = match self.kind {
            Kind::Nginx => "HUP", // what `nginx -s reload` sends
            Kind::Haproxy => "USR2",
        };
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", signal, &pid]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// Its processes that do the work.
    pub fn workers(&self) -> Vec<u32> {
        let parent = self.child.id().to_string();
        let listed = Command::new("ps").args(["-o", "pid=", "--ppid", &parent]).output();
        let text = String::from_utf8(listed.expect("ps runs").stdout).unwrap();
        text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {:?} at {} ---\n{}", self.kind, self.url, self.log());
        }
        // Both end with all their processes, at once, at SIGTERM; the workers of a master that was
        // killed would stay.
        let pid = self.child.id().to_string();
        let _ = Command::new("kill").args(["-s", "TERM", &pid]).status();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// Not below the target folder, where `nobody` may not get.
fn folder() -> PathBuf {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("taskwire-proxy-{}-{number}", std::process::id());
    let folder = std::env::temp_dir().join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    if is_root() {
        chown(&folder, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    folder
}

fn command(kind: Kind, program: &Path, folder: &Path) -> Command {
    let nobody = NOBODY.to_string();
    let mut command = if is_root() {
        // It becomes the program: the pid is the program's.
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &nobody, "--regid", &nobody, "--clear-groups", "--"]);
        command.arg(program);
        command
    } else {
        Command::new(program)
    };
    command.current_dir(folder);
    let config = folder.join("config");
    match kind {
        Kind::Nginx => {
            let pid = folder.join("pid");
            let own = format!("daemon off; pid {}; error_log stderr warn;", pid.display());
            command.args(["-p", ".", "-g", &own, "-c"]).arg(config);
        }
        Kind::Haproxy => {
            command.args(["-W", "-db", "-f"]).arg(config);
        }
    }
    command
}
