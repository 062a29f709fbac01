//! F17: Postgres behind `PgBouncer`, the real one.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use serde_json::json;

use crate::support::{Replica, TestDb, eventually, programs};

/// A pooler before one test's database.
struct Pooler {
    url: String,
    child: Child,
    folder: PathBuf,
}

impl Pooler {
    /// `None`: `PgBouncer` is not installed.
    async fn start(db: &TestDb, mode: &str) -> Option<Self> {
        let program = programs::find("pgbouncer")?;
        let (front, rest) = db.url.split_once("://").unwrap();
        let (login, rest) = rest.rsplit_once('@').unwrap();
        let (user, password) = login.split_once(':').unwrap_or((login, ""));
        let (target, path) = rest.split_once('/').unwrap();
        let (host, port) = target.split_once(':').unwrap_or((target, "5432"));
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let folder = std::env::temp_dir().join(format!("{}-pooler", db.name));
        std::fs::create_dir_all(&folder).unwrap();
        // As it comes, but for what it cannot know. Few connections: they are shared all the time.
        let settings = format!(
            "[databases]\n{name} = host={host} port={port} dbname={name} user={user} password={password}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {free}\nunix_socket_dir =\n\
             auth_type = any\npool_mode = {mode}\ndefault_pool_size = {size}\n",
            name = db.name,
            size = if mode == "session" { 40 } else { 3 },
        );
        let file = folder.join("pgbouncer.ini");
        std::fs::write(&file, settings).unwrap();
        let mut command = Command::new(program);
        command.arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some(id) = not_root(&folder, &file) {
            command.uid(id);
        }
        let child = command.spawn().expect("pgbouncer starts");
        let url = format!("{front}://{login}@127.0.0.1:{free}/{path}");
        eventually("pgbouncer listens", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", free)).await.ok()
        })
        .await;
        Some(Self { url, child, folder })
    }
}

/// `PgBouncer` does not run as root: then the user as which it does, who may read its file.
fn not_root(folder: &std::path::Path, file: &std::path::Path) -> Option<u32> {
    let id = |of: &[&str]| {
        let said = Command::new("id").args(of).output().ok()?.stdout;
        String::from_utf8(said).ok()?.trim().parse::<u32>().ok()
    };
    if id(&["-u"]) != Some(0) {
        return None;
    }
    let other = id(&["-u", "postgres"]).or_else(|| id(&["-u", "nobody"]))?;
    for path in [folder, file] {
        std::os::unix::fs::chown(path, Some(other), None).unwrap();
    }
    Some(other)
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn refused(args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_taskwire"));
    command.args(["serve", "--bind", "127.0.0.1:0"]).args(args).env_remove("DATABASE_URL");
    let Output { status, stderr, .. } = command.stdin(Stdio::null()).output().unwrap();
    assert!(!status.success());
    String::from_utf8(stderr).unwrap()
}

/// What a worker and a producer do, over the whole API.
async fn works(replica: &Replica) {
    let mut stream = replica.stream("worker_id=w").await;
    let mut ids = Vec::new();
    for n in 0..20 {
        ids.push(replica.create(json!({"title": format!("{n}"), "metadata": {"n": n}})).await);
    }
    let mut heard = stream.announced_many(ids.len()).await;
    heard.sort();
    let mut expected = ids.clone();
    expected.sort();
    assert_eq!(heard, expected);
    // All at the same time, over all connections.
    let calls = ids.iter().map(async |id| {
        replica.claim(id, "w").await.expect(200);
        let beat = json!({"worker_id": "w", "progress": 0.5, "checkpoint": {"at": 1}});
        replica.post(&format!("/v1/tasks/{id}/heartbeat"), beat).await.expect(200);
        replica.finish("complete", id, "w", json!({"result": {"ok": true}})).await.expect(200);
        assert_eq!(replica.task(id).await["status"], "completed");
        replica.get(&format!("/v1/tasks/{id}/attempts")).await.expect(200);
        replica.get("/v1/tasks?status=completed&limit=10").await.expect(200);
        replica.get("/v1/workers/connected").await.expect(200);
    });
    futures_util::future::join_all(calls).await;
    let batch = json!([{"title": "one"}, {"title": "two"}]);
    replica.post("/v1/tasks/batch", batch).await.expect(201);
    stream.announced_many(2).await;
    replica.post("/v1/tasks/claim", json!({"worker_id": "w", "n": 2})).await.expect(200);
    let taken = replica.claim(&ids[0], "other").await;
    assert!([403, 409].contains(&taken.status), "{taken:?}");
    replica.get("/readyz").await.expect(200);
    let log = replica.log();
    assert!(!log.contains("ERROR") && !log.contains("listener lost"), "{log}");
}

#[tokio::test]
async fn f17_a_pooler_in_transaction_mode_alone_is_refused_with_cause_and_cure() {
    let db = TestDb::new().await;
    let Some(pooler) = Pooler::start(&db, "transaction").await else { return };
    let said = refused(&["--database-url", &pooler.url]);
    for word in ["pooler in transaction mode", "PgBouncer", "DATABASE_LISTEN_URL"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    // And nothing was done before.
    assert_eq!(db.value("select to_regclass('tasks') is null").await, "true");
}

#[tokio::test]
async fn f17_through_a_pooler_in_transaction_mode_everything_works_with_a_direct_listen_url() {
    let db = TestDb::new().await;
    let Some(pooler) = Pooler::start(&db, "transaction").await else { return };
    let flags = ["--database-url", &pooler.url, "--database-listen-url", &db.url];
    // Two of them: each finds the other's leavings in the sessions that they share.
    let replicas = [Replica::start_with(&db, &flags).await, Replica::start_with(&db, &flags).await];
    works(&replicas[0]).await;
    replicas[1].get("/readyz").await.expect(200);
    let id = replicas[1].create(json!({"title": "x"})).await;
    replicas[0].claim(&id, "w").await.expect(200);

    // Callers that hang up in the midst leave no transaction open.
    let impatient = reqwest::Client::builder().no_proxy().build().unwrap();
    let calls = (0..60).map(|n| {
        let call = impatient.get(format!("{}/v1/tasks?limit=1000", replicas[0].url)).send();
        tokio::time::timeout(std::time::Duration::from_micros(500 + n * 100), call)
    });
    futures_util::future::join_all(calls).await;
    eventually("no transaction is open", async || {
        let open = "select count(*) from pg_stat_activity where datname = current_database()
                      and state like 'idle in transaction%'";
        (db.value(open).await == "0").then_some(())
    })
    .await;
    // A statement's limits hold there, too, and leave no trace in the pooler's sessions.
    db.execute(
        "create table seen (setting text);
         create function note() returns trigger language plpgsql as $$ begin
             insert into seen select string_agg(current_setting(name), ' ')
               from unnest(array['statement_timeout', 'lock_timeout', 'jit']) as name;
             return null; end $$;
         create trigger note after insert on tasks for each statement execute function note()",
    )
    .await;
    replicas[0].create(json!({"title": "x"})).await;
    assert_eq!(db.value("select string_agg(setting, ',') from seen").await, "10s 2s off");
    let through: sqlx::postgres::PgPool = sqlx::postgres::PgPoolOptions::new().connect_lazy_with(
        pooler.url.parse::<sqlx::postgres::PgConnectOptions>().unwrap().extra_float_digits(None),
    );
    for _ in 0..6 {
        let row = sqlx::raw_sql("show statement_timeout").fetch_one(&through).await.unwrap();
        assert_eq!(sqlx::Row::get::<String, _>(&row, 0), "0");
    }
}

#[tokio::test]
async fn f17_through_a_pooler_in_session_mode_everything_works_as_it_is() {
    let db = TestDb::new().await;
    let Some(pooler) = Pooler::start(&db, "session").await else { return };
    let replica = Replica::start_with(&db, &["--database-url", &pooler.url]).await;
    works(&replica).await;
}
