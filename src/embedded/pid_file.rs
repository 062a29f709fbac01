//! `postmaster.pid`, in which a running PostgreSQL tells of itself.

use super::cluster::Cluster;
use std::fs;
use std::io;

/// What PostgreSQL says of itself.
pub(super) struct PidFile {
    pub(super) pid: u32,
    pub(super) port: u16,
    /// "starting", "ready" or "stopping".
    pub(super) status: String,
}

impl PidFile {
    /// What the file says now, if it is there and complete. PostgreSQL may have been killed
    /// since it wrote this.
    pub(super) fn read(cluster: &Cluster) -> Option<Self> {
        let text = fs::read_to_string(cluster.folder.cluster().join("postmaster.pid")).ok()?;
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        Some(Self {
            pid: lines.first()?.parse().ok()?,
            port: lines.get(3)?.parse().ok()?,
            status: (*lines.get(7).unwrap_or(&"starting")).to_owned(),
        })
    }

    /// Whether the process is certainly not PostgreSQL but has only got its number, as happens
    /// after a crash in containers, where numbers are small. Only Linux tells.
    pub(super) fn is_stale(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/comm", self.pid))
            .is_ok_and(|name| name.trim_end() != "postgres")
    }

    /// Puts this process in place of a stale one. PostgreSQL knows that its parent is not
    /// PostgreSQL; by the rest of the file it still finds out whether processes of the former
    /// one are left, which it could not if the file were deleted.
    pub(super) fn replace_stale(cluster: &Cluster) -> io::Result<()> {
        let path = cluster.folder.cluster().join("postmaster.pid");
        let text = fs::read_to_string(&path)?;
        let rest = text.split_once('\n').map_or("", |(_, rest)| rest);
        fs::write(&path, format!("{}\n{rest}", std::process::id()))
    }
}

/// Whether the process that the file names runs. That may be another program that has the
/// number by now.
pub(super) fn names_running(cluster: &Cluster) -> bool {
    let mut command = cluster.folder.user().command(cluster.binaries.program("pg_ctl"));
    command.arg("status").arg("--pgdata").arg(cluster.folder.cluster());
    command.output().is_ok_and(|output| output.status.success())
}
