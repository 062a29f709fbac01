//! The machine, and what a process takes of it.

use std::fs;
use std::thread::available_parallelism;

/// Parts of a second in which Linux counts a process's CPU time (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;

pub(super) fn cores() -> usize {
    available_parallelism().map_or(0, usize::from)
}

/// The processor's name, as Linux knows it.
pub(super) fn model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim());
    name.unwrap_or("unknown").to_owned()
}

/// Resident memory of a process, in KiB. `None` where there is no `/proc`.
pub(super) fn resident_kib(pid: u32) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").trim().parse().ok()
}

/// CPU time that a process has taken, in seconds, with its threads. `None` where there is no `/proc`.
pub(super) fn cpu_seconds(pid: u32) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name stands in parentheses and may have blanks.
    let fields: Vec<_> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |place: usize| fields.get(place)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / TICKS_PER_SECOND)
}
