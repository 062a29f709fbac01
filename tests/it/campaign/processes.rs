//! Real workers: processes of the examples, as users run them. The ledger hears nothing of what they
//! do; what they did is in `attempts`.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;

/// The codebase that they work for.
pub const CODEBASE: &str = "real";

pub struct Processes {
    /// What each place runs, and where it calls.
    places: Vec<Place>,
    running: Mutex<Vec<Option<Child>>>,
    pub killed: AtomicUsize,
    pub stopped: AtomicUsize,
    /// They ended themselves, as after an answer that they did not expect.
    pub ended: AtomicUsize,
}

struct Place {
    program: &'static str,
    server: String,
    n: usize,
}

impl Processes {
    /// Half of them in Python, half in sh, spread over the servers. Who lacks an interpreter has none.
    pub fn start(count: usize, servers: &[String]) -> Self {
        let is_there = |program: &str, asked: &str| {
            let mut command = Command::new(program);
            let found = command.arg(asked).stdout(Stdio::null()).stderr(Stdio::null()).status();
            let found = found.is_ok_and(|status| status.success());
            if !found {
                eprintln!("{program} is missing: no real workers of it");
            }
            found
        };
        let (python, curl) = (is_there("python3", "--version"), is_there("curl", "--version"));
        let place = |n: usize| {
            let program = if n.is_multiple_of(2) { "python3" } else { "sh" };
            let is_wanted = if n.is_multiple_of(2) { python } else { curl };
            let server = servers[n % servers.len()].clone();
            is_wanted.then_some(Place { program, server, n })
        };
        let places: Vec<_> = (0..count).filter_map(place).collect();
        let running = places.iter().map(|place| Some(place.start(0))).collect();
        let (killed, stopped, ended) = Default::default();
        Self { places, running: Mutex::new(running), killed, stopped, ended }
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// SIGKILL of some, and others in their places.
    pub fn kill_some(&self, rng: &mut StdRng) {
        let mut running = self.running.lock().unwrap();
        for (place, child) in self.places.iter().zip(running.iter_mut()) {
            if rng.random() {
                end(child);
                *child = Some(place.start(self.killed.fetch_add(1, Ordering::Relaxed) + 1));
            }
        }
    }

    /// SIGSTOP of some, and SIGCONT later.
    pub async fn stop_some(&self, rng: &mut StdRng, pause: Duration) {
        let chosen: Vec<u32> = {
            let running = self.running.lock().unwrap();
            running.iter().flatten().map(Child::id).filter(|_| rng.random()).collect()
        };
        self.stopped.fetch_add(chosen.len(), Ordering::Relaxed);
        for pid in &chosen {
            signal(*pid, "STOP");
        }
        tokio::time::sleep(pause).await;
        for pid in &chosen {
            signal(*pid, "CONT");
        }
    }

    /// Starts anew whoever has ended.
    pub fn look_after(&self) {
        let mut running = self.running.lock().unwrap();
        for (place, child) in self.places.iter().zip(running.iter_mut()) {
            if child.as_mut().is_some_and(|child| !matches!(child.try_wait(), Ok(None))) {
                end(child);
                *child = Some(place.start(1_000_000 + self.ended.fetch_add(1, Ordering::Relaxed)));
            }
        }
    }

    pub fn figures(&self) -> String {
        let of = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        format!(
            "{} processes of the examples: {} killed, {} stopped past their leases, {} ended themselves",
            self.places.len(),
            of(&self.killed),
            of(&self.stopped),
            of(&self.ended)
        )
    }
}

impl Place {
    /// A new process under a new name, in a group of its own, so that it ends with its children.
    fn start(&self, life: usize) -> Child {
        let name = format!("real-{}-{}-{life}", std::process::id(), self.n);
        let mut command = Command::new(self.program);
        if self.program == "sh" {
            command.arg("examples/worker.sh");
            command.env("CODEBASES", CODEBASE).env("TASKWIRE_SERVER", &self.server);
            command.env("WORKER_ID", &name);
        } else {
            command.args(["examples/worker_sse_client.py", "--server", &self.server]);
            command.args(["--codebases", CODEBASE, "--worker-id", &name]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.process_group(0).spawn().expect("a real worker starts")
    }
}

fn end(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        signal(child.id(), "KILL");
        let _ = child.wait();
    }
}

/// To a process and its children.
fn signal(pid: u32, name: &str) {
    let mut command = Command::new("kill");
    let _ = command.args(["-s", name, "--", &format!("-{pid}")]).stderr(Stdio::null()).status();
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.running.lock().unwrap().iter_mut().for_each(end);
    }
}
