//! F18: a hot standby, a real one, and a primary that becomes read-only.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::link::FaultyLink;
use crate::support::{Replica, eventually};

/// Within this `/readyz` names what is wrong.
const NAMED_WITHIN: Duration = Duration::from_secs(10);

/// Two clusters of the test's own: a primary, and later its standby.
struct Pair {
    bin: PathBuf,
    folder: PathBuf,
    /// PostgreSQL refuses to run as root: then the user and group as which it runs.
    user: Option<(u32, u32)>,
}

fn id(of: &[&str]) -> Option<u32> {
    let said = Command::new("id").args(of).output().ok()?.stdout;
    String::from_utf8(said).ok()?.trim().parse().ok()
}

/// The folder with PostgreSQL's programs, `pg_basebackup` among them.
fn programs() -> Option<PathBuf> {
    let set = std::env::var_os("TASKWIRE_POSTGRES_BIN").map(PathBuf::from);
    let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut folders: Vec<_> = installed.map(|entry| entry.path().join("bin")).collect();
    folders.sort();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        set.into_iter().chain(folders.into_iter().rev()).chain(std::env::split_paths(&path));
    found.into_iter().find(|folder| folder.join("pg_basebackup").is_file())
}

impl Pair {
    fn new() -> Option<Self> {
        let Some(bin) = programs() else {
            eprintln!("skipped: pg_basebackup is not installed");
            return None;
        };
        let name = format!("taskwire-standby-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let user = (id(&["-u"]) == Some(0)).then(|| {
            let name = if id(&["-u", "postgres"]).is_some() { "postgres" } else { "nobody" };
            (id(&["-u", name]).unwrap(), id(&["-g", name]).unwrap())
        });
        if let Some((user, group)) = user {
            std::os::unix::fs::chown(&folder, Some(user), Some(group)).unwrap();
        }
        Some(Self { bin, folder, user })
    }

    fn run(&self, program: &str, args: &[&str]) {
        let mut command = Command::new(self.bin.join(program));
        command.args(args).current_dir(&self.folder).env("LC_ALL", "C");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some((user, group)) = self.user {
            command.uid(user).gid(group);
        }
        assert!(command.status().unwrap().success(), "{program} {args:?}");
    }

    fn start(&self, name: &str) -> String {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let options = format!(
            "-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off \
             -c max_connections=60"
        );
        self.run(
            "pg_ctl",
            &["-D", name, "-l", &format!("{name}.log"), "-w", "-o", &options, "start"],
        );
        format!("127.0.0.1:{port}")
    }

    fn stop(&self, name: &str) {
        if Path::new(&self.folder).join(name).join("postmaster.pid").exists() {
            self.run("pg_ctl", &["-D", name, "-m", "immediate", "-w", "stop"]);
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop("standby");
        self.stop("primary");
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn serve(url: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_taskwire"));
    command.args(["serve", "--bind", "127.0.0.1:0", "--drain-seconds", "1", "--database-url", url]);
    command
}

async fn sql(url: &str, sql: &'static str) {
    let pool = sqlx::postgres::PgPoolOptions::new().max_connections(1).connect(url).await.unwrap();
    for statement in sql.split(';') {
        sqlx::raw_sql(statement).execute(&pool).await.unwrap();
    }
    pool.close().await;
}

async fn is_not_ready(replica: &Replica, why: &str) {
    let begun = Instant::now();
    eventually(&format!("it is not ready: {why}"), async || {
        let ready = replica.get("/readyz").await;
        (ready.status == 503 && ready.text.contains(why)).then_some(())
    })
    .await;
    assert!(begun.elapsed() < NAMED_WITHIN, "{:?}", begun.elapsed());
    eventually("writes are refused", async || {
        let answer = replica.post("/v1/tasks", json!({"title": "refused"})).await;
        assert_eq!((answer.status, answer.problem().as_str()), (503, "postgres_unavailable"));
        Some(())
    })
    .await;
    eventually("the log says it, too", async || {
        replica.log().contains(&format!("not safe: {why}")).then_some(())
    })
    .await;
}

async fn is_ready(replica: &Replica) {
    eventually("it is ready", async || (replica.get("/readyz").await.status == 200).then_some(()))
        .await;
    eventually("it writes", async || {
        (replica.post("/v1/tasks", json!({"title": "x"})).await.status == 201).then_some(())
    })
    .await;
}

#[tokio::test]
async fn f18_a_standby_is_refused_and_a_primary_that_becomes_one_is_told_at_once() {
    let Some(pair) = Pair::new() else { return };
    pair.run(
        "initdb",
        &["-D", "primary", "-U", "taskwire", "-A", "trust", "-E", "UTF8", "--no-sync"],
    );
    let primary = pair.start("primary");
    let url = |server: &str| format!("postgres://taskwire@{server}/postgres");
    let link = FaultyLink::to_url(&url(&primary)).await;
    let replica = Replica::spawn(serve(&link.url)).await;
    replica.create(json!({"title": "x"})).await;
    let (host, port) = primary.split_once(':').unwrap();
    let copy = ["-h", host, "-p", port, "-U", "taskwire", "-D", "standby", "-R", "-X", "stream"];
    pair.run("pg_basebackup", &[&copy[..], &["--checkpoint=fast", "--no-sync"]].concat());
    let standby = pair.start("standby");

    let refused = serve(&url(&standby)).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && said.contains("this Postgres is a standby"), "{said}");

    sql(
        &url(&primary),
        "alter system set default_transaction_read_only = on; select pg_reload_conf()",
    )
    .await;
    is_not_ready(&replica, "Postgres is read-only").await;
    sql(
        &url(&primary),
        "set default_transaction_read_only = off; alter system reset default_transaction_read_only; select pg_reload_conf()",
    )
    .await;
    is_ready(&replica).await;

    link.lead_to(standby.clone());
    is_not_ready(&replica, "Postgres is a standby").await;

    // A failover: the standby becomes the primary.
    pair.stop("primary");
    pair.run("pg_ctl", &["-D", "standby", "-w", "promote"]);
    is_ready(&replica).await;
    let mut stream = replica.stream("worker_id=w").await;
    let id = replica.create(json!({"title": "after", "priority": 9})).await;
    loop {
        if stream.announced().await == id {
            break;
        }
    }
}
