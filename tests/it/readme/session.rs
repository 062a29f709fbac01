//! A shell in a folder of its own, and what stands in for the commands that a test cannot run.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use taskwire::config::SETTINGS;

use super::{Block, ROOT};

/// The page takes about 20 s.
const PAGE_PATIENCE: Duration = Duration::from_mins(2);
/// The drain, and what comes after it.
const STOP_PATIENCE: Duration = Duration::from_secs(10 + 3);
/// Of the repository, what commands of the page use. `.taskwire` and the like must be made anew.
const LINKED: [&str; 3] = ["examples", "deploy", "docker-compose.yml"];

/// Stands in for cargo. `$1` and so on are cargo's own.
const CARGO: &str = r#"#!/bin/sh
set -e
[ "$1" = run ] || exit 0
shift
[ "$1" != --release ] || shift
[ "$1" != -- ] || shift
[ $# = 0 ] || exec '{binary}' "$@"
export TASKWIRE_BIND="${TASKWIRE_BIND:-127.0.0.1:8000}"
'{binary}' &
echo $! >>'{dir}/pids'
tries=0
until curl -sf "http://$TASKWIRE_BIND/readyz" >/dev/null; do
  tries=$((tries + 1))
  [ $tries -lt 200 ] || { echo "not ready after 20 s" >&2; exit 1; }
  sleep 0.1
done
"#;

/// Stands in for docker. `{docker}` is the real one.
const DOCKER: &str = r"#!/bin/sh
[ -f docker-compose.yml ] && '{docker}' compose version >/dev/null 2>&1 || exit 0
exec '{docker}' compose config -q
";

/// A folder, a shell in it, and the servers that the shell started.
pub struct Session {
    dir: PathBuf,
    ports: [u16; 2],
    shell: Option<u32>,
}

impl Session {
    pub fn new() -> Self {
        // Not below the target folder, which may lie where PostgreSQL's user cannot get.
        let dir = std::env::temp_dir().join(format!("taskwire-readme-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        for folder in ["bin", "out", "work"] {
            fs::create_dir_all(dir.join(folder)).unwrap();
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        let free = [0; 2].map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        let ports = free.map(|listener| listener.local_addr().unwrap().port());
        let session = Self { dir: dir.canonicalize().unwrap(), ports, shell: None };
        session.program("cargo", CARGO);
        session.program("docker", DOCKER);
        for name in LINKED {
            let path = Path::new(ROOT).join(name);
            if path.exists() {
                symlink(path, session.dir.join("work").join(name)).unwrap();
            }
        }
        session
    }

    /// Replaces the page's ports by ours.
    fn ported(&self, text: &str) -> String {
        let [a, b] = self.ports.map(|port| format!("127.0.0.1:{port}"));
        text.replace("127.0.0.1:8000", &a).replace("127.0.0.1:8001", &b)
    }

    fn program(&self, name: &str, text: &str) {
        let docker = path_with_postgres()
            .iter()
            .map(|folder| folder.join("docker"))
            .find(|path| path.is_file())
            .unwrap_or_else(|| "false".into());
        let text = text
            .replace("{binary}", env!("CARGO_BIN_EXE_taskwire"))
            .replace("{docker}", &docker.display().to_string())
            .replace("{dir}", &self.dir.display().to_string());
        let path = self.dir.join("bin").join(name);
        fs::write(&path, self.ported(&text)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What a block printed, with the page's ports, if it ran.
    pub fn output(&self, block: &Block) -> Option<String> {
        let bytes = fs::read(self.dir.join("out").join(block.line.to_string())).ok()?;
        let [a, b] = self.ports.map(|port| format!("127.0.0.1:{port}"));
        let text = String::from_utf8_lossy(&bytes).replace(&a, "127.0.0.1:8000");
        Some(text.replace(&b, "127.0.0.1:8001"))
    }

    /// Runs the blocks in one shell; each prints into a file of its own. The line of the one that
    /// did not end well.
    pub fn run(&mut self, blocks: &[Block]) -> Result<(), usize> {
        let mut script = "set -euo pipefail\n".to_owned();
        for block in blocks {
            let out = self.dir.join("out").join(block.line.to_string());
            let text = self.ported(&block.text);
            write!(script, "exec >'{}' 2>&1\n{text}\n", out.display()).unwrap();
        }
        let path = self.dir.join("script");
        fs::write(&path, script).unwrap();
        let mut programs = path_with_postgres();
        programs.insert(0, self.dir.join("bin"));
        let mut command = Command::new("bash");
        command
            .arg(path)
            .current_dir(self.dir.join("work"))
            .env("PATH", std::env::join_paths(programs).unwrap())
            .env("no_proxy", "127.0.0.1")
            .env("TASKWIRE_SERVER", self.ported("http://127.0.0.1:8000")) // the examples' default
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .process_group(0);
        // The page's server knows no settings, however the tests are run.
        for setting in SETTINGS.iter().map(|setting| setting.env) {
            if setting != "TASKWIRE_POSTGRES_BIN" {
                command.env_remove(setting);
            }
        }
        let mut shell = command.spawn().expect("bash runs");
        self.shell = Some(shell.id());
        let begun = Instant::now();
        while begun.elapsed() < PAGE_PATIENCE {
            match shell.try_wait().expect("the shell can be asked") {
                Some(status) if status.success() => return Ok(()),
                Some(_) => break,
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        let _ = shell.kill();
        let _ = shell.wait();
        let begun = |block: &&Block| self.output(block).is_some();
        Err(blocks.iter().rfind(begun).map_or(0, |block| block.line))
    }

    /// Ends the servers as an operator would; whether they and their Postgres ended in time.
    pub fn stop(&mut self) -> bool {
        let Some(shell) = self.shell.take() else {
            return true;
        };
        let pids = fs::read_to_string(self.dir.join("pids")).unwrap_or_default();
        kill("TERM", pids.split_whitespace());
        let serves = |port: &u16| {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
            TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
        };
        let ended = within(STOP_PATIENCE, || !self.ports.iter().any(serves));
        // Whatever else is left of the shell's children, and servers that did not listen to TERM.
        kill("KILL", [format!("-{shell}").as_str()].into_iter());
        // The guard of the server's Postgres holds a lock for as long as that runs.
        let guard = self.dir.join("work/.taskwire/guard.lock");
        ended && within(STOP_PATIENCE, || is_unlocked(&guard))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// PATH, and where PostgreSQL's programs are that are not in it.
fn path_with_postgres() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        std::env::var_os("TASKWIRE_POSTGRES_BIN").map(PathBuf::from).into_iter().collect();
    folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let installed = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    folders.extend(installed.flatten().map(|entry| entry.path().join("bin")));
    folders
}

fn kill<'a>(signal: &str, pids: impl Iterator<Item = &'a str>) {
    for pid in pids {
        let mut kill = Command::new("kill");
        kill.args(["-s", signal, "--", pid]).stderr(Stdio::null()).status().expect("kill runs");
    }
}

fn within(limit: Duration, check: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < limit {
        if check() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    false
}

fn is_unlocked(path: &Path) -> bool {
    match File::open(path) {
        Ok(file) => file.try_lock_shared().is_ok(),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}
