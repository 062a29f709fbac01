//! A database for each test, on the Postgres of `DATABASE_URL` or on one that the tests start.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row};
use taskwire::embedded::{Embedded, Options};
use tokio::sync::OnceCell;

/// The Postgres that all tests of this run share. Its guard stops it when this process ends.
static SHARED: OnceCell<Shared> = OnceCell::const_new();
/// How long a test waits for its database to be dropped.
const DROP_WAIT: Duration = Duration::from_secs(2);
/// How long a query may take where Postgres may be away.
const TRY_WAIT: Duration = Duration::from_secs(5);
static NUMBER: AtomicU32 = AtomicU32::new(0);

struct Shared {
    url: String,
    _own: Option<Embedded>,
}

async fn shared() -> &'static Shared {
    SHARED
        .get_or_init(|| async {
            if let Some(url) = std::env::var_os("DATABASE_URL").filter(|url| !url.is_empty()) {
                let url = url.into_string().expect("UTF-8");
                return Shared { url, _own: None };
            }
            let own = Embedded::start(&Options {
                data_dir: PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("postgres"),
                postgres_bin: std::env::var_os("TASKWIRE_POSTGRES_BIN").map(Into::into),
                guard_exe: env!("CARGO_BIN_EXE_taskwire").into(),
            })
            .await
            .expect("the tests' Postgres starts");
            drop_leftovers(own.url()).await;
            Shared { url: own.url().to_owned(), _own: Some(own) }
        })
        .await
}

/// Databases of test runs that were killed. Only on the tests' own Postgres: elsewhere the process
/// of that number may run on another machine.
async fn drop_leftovers(url: &str) {
    let mut admin = connect(url).await;
    let names = admin
        .fetch_all("select datname from pg_database where datname like 'taskwire\\_test\\_%'")
        .await
        .expect("databases are listed");
    for row in names {
        let name: String = row.get(0);
        let pid = name.split('_').nth(2).unwrap_or_default().to_owned();
        if !PathBuf::from(format!("/proc/{pid}")).exists() {
            let drop = format!("drop database if exists {name} with (force)");
            let _ = admin.execute(sqlx::raw_sql(AssertSqlSafe(drop))).await;
        }
    }
}

async fn connect(url: &str) -> sqlx::PgConnection {
    let options: PgConnectOptions = url.parse().expect("a Postgres URL");
    options.disable_statement_logging().connect().await.expect("Postgres answers")
}

/// One test's database.
pub struct TestDb {
    pub name: String,
    pub url: String,
    pub pool: PgPool,
    admin_url: String,
}

impl TestDb {
    pub async fn new() -> Self {
        Self::on(&shared().await.url).await
    }

    /// A database on another Postgres.
    pub async fn on(server_url: &str) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("taskwire_test_{}_{number}", std::process::id());
        let mut admin = connect(server_url).await;
        admin
            .execute(sqlx::raw_sql(AssertSqlSafe(format!("create database {name}"))))
            .await
            .expect("a database is created");
        let _ = admin.close().await;
        let options: PgConnectOptions = server_url.parse().expect("a Postgres URL");
        let url = options.database(&name).to_url_lossy().to_string();
        let pool = PgPoolOptions::new()
            .max_connections(4)
            .connect_lazy_with(url.parse().expect("a Postgres URL"));
        Self { name, url, pool, admin_url: server_url.to_owned() }
    }

    /// Runs SQL as an operator would.
    pub async fn execute(&self, sql: &str) {
        let done = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&self.pool).await;
        done.unwrap_or_else(|error| panic!("{error}: {sql}"));
    }

    /// The same where Postgres may be away; `None` then.
    pub async fn try_value(&self, sql: &str) -> Option<String> {
        let sql = AssertSqlSafe(format!("select ({sql})::text"));
        let asked = sqlx::raw_sql(sql).fetch_one(&self.pool);
        let row = tokio::time::timeout(TRY_WAIT, asked).await.ok()?.ok()?;
        row.try_get(0).ok()
    }

    /// The one value that a query gives, as text.
    pub async fn value(&self, sql: &str) -> String {
        let sql = format!("select ({sql})::text");
        let row = sqlx::raw_sql(AssertSqlSafe(sql.clone())).fetch_one(&self.pool).await;
        let value: Option<String> = row.unwrap_or_else(|error| panic!("{error}: {sql}")).get(0);
        value.unwrap_or_default()
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        let (url, name) = (self.admin_url.clone(), self.name.clone());
        let drop = async move {
            let options: PgConnectOptions = url.parse().expect("a Postgres URL");
            // A Postgres that is gone has taken the database with it.
            let Ok(mut admin) = options.disable_statement_logging().connect().await else { return };
            let sql = format!("drop database if exists {name} with (force)");
            let _ = admin.execute(sqlx::raw_sql(AssertSqlSafe(sql))).await;
        };
        // Drop is not async, and this thread may be inside a runtime: so another thread. Not waited
        // for to its end: Postgres 15 was seen to take up to a minute over it, until its autovacuum
        // launcher stirs (wait event ProcSignalBarrier).
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            if let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build()
            {
                runtime.block_on(drop);
            }
            let _ = done.send(());
        });
        let _ = is_done.recv_timeout(DROP_WAIT);
    }
}
