//! What a measurement stands on: a Postgres, databases of its own in it, and a folder that is removed
//! afterwards, however it ends.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row};
use tokio::time::timeout;

use super::Failure;
use super::pgbench::Pgbench;
use crate::config::Config;
use crate::embedded::{self, Embedded};
use crate::store::migrate::migrate;

/// Postgres 15 was seen to take up to a minute to drop a database.
const DROP_DEADLINE: Duration = Duration::from_mins(2);

/// The Postgres of one run of the benchmark.
#[derive(Debug)]
pub(super) struct Ground {
    server: PgConnectOptions,
    own: Option<Embedded>,
    folder: PathBuf,
    /// Databases to drop in the end.
    made: Mutex<Vec<String>>,
    number: AtomicU32,
    pub(super) version: String,
    pub(super) pgbench: Option<Pgbench>,
}

/// One database of ours.
#[derive(Clone, Debug)]
pub(super) struct Database {
    pub(super) options: PgConnectOptions,
}

impl Ground {
    /// Uses the Postgres of `DATABASE_URL`, or starts one.
    pub(super) async fn prepare(config: &Config) -> Result<Self, Failure> {
        let folder = std::env::temp_dir().join(format!("taskwire-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        // The user as which Postgres runs must get in.
        fs::set_permissions(&folder, Permissions::from_mode(0o755))?;
        let begun = Self::begin(config, &folder).await;
        if begun.is_err() {
            remove(&folder);
        }
        begun
    }

    async fn begin(config: &Config, folder: &Path) -> Result<Self, Failure> {
        let own = match &config.database_url {
            Some(_) => None,
            None => Some(
                Embedded::start(&embedded::Options {
                    data_dir: folder.join("data"),
                    postgres_bin: config.postgres_bin.clone(),
                    guard_exe: std::env::current_exe()?,
                })
                .await?,
            ),
        };
        let given = config.database_url.as_ref().map_or("", |url| url.reveal());
        let url = own.as_ref().map_or(given, Embedded::url).to_owned();
        let server: PgConnectOptions = url.parse()?;
        let mut ground = Self {
            server: server.disable_statement_logging(),
            own,
            folder: folder.to_owned(),
            made: Mutex::default(),
            number: AtomicU32::new(0),
            version: String::new(),
            pgbench: Pgbench::find(config.postgres_bin.as_deref(), &url).await,
        };
        let mut connection = ground.server.connect().await?;
        ground.version = text(&mut connection, "show server_version").await?;
        connection.close().await?;
        Ok(ground)
    }

    /// Where files of this run go.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A new, empty database.
    pub(super) async fn database(&self) -> Result<Database, Failure> {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let name = format!("taskwire_bench_{}_{number}", std::process::id());
        let mut connection = self.server.connect().await?;
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(name.clone());
        execute(&mut connection, &format!("create database {name}")).await?;
        connection.close().await?;
        Ok(Database { options: self.server.clone().database(&name) })
    }

    /// A new database with Taskwire's schema.
    pub(super) async fn database_with_schema(&self) -> Result<Database, Failure> {
        let database = self.database().await?;
        migrate(&database.options).await?;
        Ok(database)
    }

    /// Leaves nothing behind.
    pub(super) async fn close(self) {
        if let Some(own) = self.own {
            own.stop().await;
        } else {
            let names = self.made.into_inner().unwrap_or_else(PoisonError::into_inner);
            let drop_all = async {
                let mut connection = self.server.connect().await?;
                for name in names {
                    let sql = format!("drop database if exists {name} with (force)");
                    execute(&mut connection, &sql).await?;
                }
                Ok::<_, Failure>(())
            };
            match timeout(DROP_DEADLINE, drop_all).await {
                Ok(Ok(())) => {}
                _ => super::say("databases named taskwire_bench_… could not be dropped"),
            }
        }
        remove(&self.folder);
    }
}

impl Database {
    pub(super) async fn connect(&self) -> Result<PgConnection, Failure> {
        Ok(self.options.connect().await?)
    }

    pub(super) fn url(&self) -> String {
        self.options.to_url_lossy().to_string()
    }

    /// Runs SQL over a connection of its own.
    pub(super) async fn execute(&self, sql: &str) -> Result<(), Failure> {
        let mut connection = self.connect().await?;
        execute(&mut connection, sql).await?;
        connection.close().await?;
        Ok(())
    }
}

/// Runs SQL, one statement or several.
pub(super) async fn execute(connection: &mut PgConnection, sql: &str) -> Result<(), Failure> {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(connection).await?;
    Ok(())
}

/// The one value that a query gives, as text.
pub(super) async fn text(connection: &mut PgConnection, sql: &str) -> Result<String, Failure> {
    let row = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).fetch_one(connection).await?;
    let value: Option<String> = row.try_get(0)?;
    Ok(value.unwrap_or_default())
}

/// Removes the folder, and the cluster that lies elsewhere because Postgres' user cannot enter it.
fn remove(folder: &Path) {
    if let Ok(elsewhere) = fs::read_link(folder.join("data/postgres"))
        && let Some(home) = elsewhere.parent()
    {
        let _ = fs::remove_dir_all(home);
    }
    let _ = fs::remove_dir_all(folder);
}
