//! The README is tested like code: every command block runs, in the order of the page and in one
//! shell, and prints what the block after it shows.
//!
//! What differs from pasting it into a terminal, and nothing else does:
//! - `cargo run --release` starts the binary of this build, in the background and until it is ready;
//!   what else `cargo` is told is only noted.
//! - The ports 8000 and 8001 are two free ones.
//! - `docker` checks docker-compose.yml, where it can.

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

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const README: &str = include_str!("../../README.md");
/// The page takes about 25 s.
const PAGE_PATIENCE: Duration = Duration::from_secs(120);
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

/// One block of commands.
struct Block {
    line: usize,
    text: String,
    /// What the block after it shows, with `…` for anything.
    shown: Vec<String>,
}

/// The blocks of commands on the page, in their order.
fn blocks() -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut lines = README.lines().zip(1..);
    let mut follows_commands = false;
    while let Some((line, number)) = lines.next() {
        let Some(language) = line.strip_prefix("```") else {
            follows_commands &= line.is_empty();
            continue;
        };
        let body = lines.by_ref().map(|(line, _)| line);
        let body: Vec<_> = body.take_while(|line| *line != "```").collect();
        match (language, blocks.last_mut()) {
            ("sh", _) => blocks.push(Block {
                line: number,
                text: body.join("\n"),
                shown: Vec::new(),
            }),
            ("text" | "json", Some(before)) if follows_commands => {
                before.shown = body.iter().map(|line| (*line).to_owned()).collect();
            }
            ("text" | "json", _) => {}
            _ => panic!("line {number}: `{language}` blocks are not run; commands are `sh`"),
        }
        follows_commands = language == "sh";
    }
    blocks
}

/// A folder, a shell in it, and the servers that the shell started.
struct Session {
    dir: PathBuf,
    ports: [u16; 2],
    shell: Option<u32>,
}

impl Session {
    fn new() -> Self {
        // Not below the target folder, which may lie where PostgreSQL's user cannot get.
        let dir = std::env::temp_dir().join(format!("taskwire-readme-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        for folder in ["bin", "out", "work"] {
            fs::create_dir_all(dir.join(folder)).unwrap();
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        let free = [0; 2].map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        let ports = free.map(|listener| listener.local_addr().unwrap().port());
        let session = Self {
            dir: dir.canonicalize().unwrap(),
            ports,
            shell: None,
        };
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
        text.replace("127.0.0.1:8000", &a)
            .replace("127.0.0.1:8001", &b)
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

    fn output(&self, block: &Block) -> Option<String> {
        let bytes = fs::read(self.dir.join("out").join(block.line.to_string())).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Runs the blocks in one shell; each prints into a file of its own. The line of the one that
    /// did not end well.
    fn run(&mut self, blocks: &[Block]) -> Result<(), usize> {
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
    fn stop(&mut self) -> bool {
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
    let mut folders: Vec<PathBuf> = std::env::var_os("TASKWIRE_POSTGRES_BIN")
        .map(PathBuf::from)
        .into_iter()
        .collect();
    folders.extend(std::env::split_paths(
        &std::env::var_os("PATH").unwrap_or_default(),
    ));
    let installed = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    folders.extend(installed.flatten().map(|entry| entry.path().join("bin")));
    folders
}

fn kill<'a>(signal: &str, pids: impl Iterator<Item = &'a str>) {
    for pid in pids {
        let mut kill = Command::new("kill");
        kill.args(["-s", signal, "--", pid])
            .stderr(Stdio::null())
            .status()
            .expect("kill runs");
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

/// Without what depends on the width of a table's values.
fn plain(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a printed line is as the page shows it.
fn is_as_shown(shown: &str, printed: &str) -> bool {
    let mut pieces = shown.split('…');
    let Some(mut rest) = printed.strip_prefix(pieces.next().unwrap_or_default()) else {
        return false;
    };
    let mut last = None;
    for piece in pieces {
        if let Some(before) = last.replace(piece) {
            match rest.find(before) {
                Some(at) => rest = &rest[at + before.len()..],
                None => return false,
            }
        }
    }
    last.map_or(rest.is_empty(), |piece| rest.ends_with(piece))
}

/// The first shown line that was not printed after the ones before it.
fn missing<'a>(shown: &'a [String], printed: &str) -> Option<&'a str> {
    let mut printed = printed.lines().map(plain);
    let shown = shown.iter().filter(|line| !line.is_empty() && *line != "…");
    let mut lines = shown.map(String::as_str);
    lines.find(|shown| !printed.any(|line| is_as_shown(&plain(shown), &line)))
}

#[test]
fn every_command_of_the_readme_runs_and_prints_what_is_shown() {
    let blocks = blocks();
    let mut session = Session::new();
    let result = session.run(&blocks);
    for block in &blocks {
        let output = session.output(block).unwrap_or_default();
        let ports_back = output
            .replace(&format!("127.0.0.1:{}", session.ports[0]), "127.0.0.1:8000")
            .replace(&format!("127.0.0.1:{}", session.ports[1]), "127.0.0.1:8001");
        let trouble = match missing(&block.shown, &ports_back) {
            _ if result == Err(block.line) => "the last command failed".to_owned(),
            Some(line) => format!("it did not print: {line}"),
            None => continue,
        };
        panic!(
            "README.md, line {}: {trouble}\n--- commands\n{}\n--- output\n{ports_back}",
            block.line, block.text
        );
    }
    assert_eq!(result, Ok(()));
    assert!(session.stop(), "servers and Postgres end after SIGTERM");
}

/// Method and path of every route in the sources; `{}` stands for a parameter.
fn routes() -> Vec<(String, String)> {
    let mut routes = Vec::new();
    for file in fs::read_dir(Path::new(ROOT).join("src/http")).unwrap() {
        let source = fs::read_to_string(file.unwrap().path()).unwrap();
        for route in source.split(".route(").skip(1) {
            let path = route.split('"').nth(1).unwrap();
            let handlers = route.split('}').nth(path.matches('}').count()).unwrap();
            for method in ["get", "post", "put", "patch", "delete"] {
                if [' ', '.']
                    .iter()
                    .any(|before| handlers.contains(&format!("{before}{method}(")))
                {
                    routes.push((method.to_uppercase(), path.to_owned()));
                }
            }
        }
    }
    routes
}

/// Method and path of every curl line of the page.
fn curls(blocks: &[Block]) -> Vec<(String, String)> {
    let mut curls = Vec::new();
    for block in blocks {
        for call in block.text.split("curl ").skip(1) {
            let starts = ["/v1/", "/healthz", "/readyz", "/metrics"];
            let Some(at) = starts.iter().filter_map(|start| call.find(start)).min() else {
                continue;
            };
            let ends = |c: char| c.is_whitespace() || "?'\")".contains(c);
            let path = call[at..].split(ends).next().unwrap();
            let method = match call.split_once("-X ") {
                Some((_, method)) => method.split_whitespace().next().unwrap(),
                None if call.contains(" -d ") => "POST",
                None => "GET",
            };
            curls.push((method.to_owned(), path.to_owned()));
        }
    }
    curls
}

fn fits(route: &str, path: &str) -> bool {
    let (route, path): (Vec<_>, Vec<_>) = (route.split('/').collect(), path.split('/').collect());
    let fits = |(part, given): (&&str, &&str)| part.starts_with('{') || part == given;
    route.len() == path.len() && route.iter().zip(&path).all(fits)
}

#[test]
fn every_route_has_a_curl_line_and_every_curl_line_a_route() {
    let (routes, curls) = (routes(), curls(&blocks()));
    assert!(routes.len() > 20, "{routes:?}");
    for (method, route) in &routes {
        assert!(
            curls
                .iter()
                .any(|(m, path)| m == method && fits(route, path)),
            "{method} {route} has no curl line in README.md"
        );
        assert!(
            README.contains(&format!("| `{method} {route}` |")),
            "{method} {route} stands in no table of README.md"
        );
    }
    for (method, path) in &curls {
        // A route without parameters wins over one that has some.
        assert!(
            routes
                .iter()
                .any(|(m, route)| m == method && fits(route, path)),
            "README.md calls {method} {path}, which is no route"
        );
    }
}

#[test]
fn every_setting_and_every_error_code_is_in_the_readme() {
    for setting in SETTINGS {
        let row = format!("| `{}` | `--{}` |", setting.env, setting.flag);
        assert!(README.contains(&row), "no row {row} in README.md");
    }
    let problems = fs::read_to_string(Path::new(ROOT).join("src/http/problem.rs")).unwrap();
    let codes: Vec<_> = problems
        .split("S::")
        .skip(1)
        .filter_map(|after| {
            let (status, rest) = after.split_once(',')?;
            let code = rest.trim_start().strip_prefix('"')?.split('"').next()?;
            status
                .bytes()
                .all(|b| b == b'_' || b.is_ascii_uppercase())
                .then_some(code)
        })
        .collect();
    assert!(codes.len() > 25, "{codes:?}");
    for code in codes {
        assert!(
            README.contains(&format!("`{code}`")),
            "no `{code}` in README.md"
        );
    }
}

#[test]
fn every_link_of_the_readme_leads_to_something() {
    let targets = README
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next());
    for target in targets.filter(|target| !target.starts_with("https://")) {
        let found = match target.strip_prefix('#') {
            Some(anchor) => README.lines().any(|line| {
                let name = line.trim_start_matches('#').trim_start();
                line.starts_with('#')
                    && name.to_lowercase().replace(' ', "-").replace('\'', "") == anchor
            }),
            None => Path::new(ROOT).join(target).exists(),
        };
        assert!(found, "README.md links to {target}, which is not there");
    }
}

#[test]
fn an_ellipsis_stands_for_anything_and_nothing_else_does() {
    for (shown, printed) in [
        ("a…", "abc"),
        ("…c", "abc"),
        ("a…b…c", "a1b2bc"),
        ("…", ""),
        ("a", "a"),
    ] {
        assert!(is_as_shown(shown, printed), "{shown} {printed}");
    }
    for (shown, printed) in [
        ("a", "ab"),
        ("a…b", "a"),
        ("a…b…c", "ac"),
        ("b…", "ab"),
        ("…b", "ba"),
    ] {
        assert!(!is_as_shown(shown, printed), "{shown} {printed}");
    }
}
