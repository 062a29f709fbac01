//! Every setting: name, default, unit. The only reader of the environment.
//!
//! One table makes the flags, the help, the environment's names and the checks.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::domain::Fanout;

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Its name in the environment and in `.env`.
    pub env: &'static str,
    /// Its flag of `taskwire serve`, without the dashes.
    pub flag: &'static str,
    /// What its value is called in the help.
    pub value: &'static str,
    /// What it means, with its default.
    pub help: &'static str,
}

/// The settings, in the order of the help.
pub const SETTINGS: [Setting; 15] = [
    setting(
        "DATABASE_URL",
        "database-url",
        "URL",
        "Postgres to use [default: an own one is started]",
    ),
    setting(
        "DATABASE_LISTEN_URL",
        "database-listen-url",
        "URL",
        "direct connection for LISTEN, when DATABASE_URL goes through a transaction pooler [default: DATABASE_URL]",
    ),
    setting("TASKWIRE_BIND", "bind", "ADDRESS", "address to serve on [default: 127.0.0.1:8000]"),
    setting(
        "TASKWIRE_DATA_DIR",
        "data-dir",
        "DIR",
        "home of the own Postgres [default: .taskwire]",
    ),
    setting(
        "TASKWIRE_POSTGRES_BIN",
        "postgres-bin",
        "DIR",
        "folder of the PostgreSQL binaries for the own Postgres [default: searched for]",
    ),
    setting("WORKER_SSE_ENABLED", "worker-sse-enabled", "BOOL", "serve streams [default: true]"),
    setting(
        "WORKER_SSE_KEEPALIVE",
        "worker-sse-keepalive",
        "SECONDS",
        "a keepalive event after this much silence, 1 to 3600 [default: 30]",
    ),
    setting(
        "WORKER_SSE_TIMEOUT",
        "worker-sse-timeout",
        "SECONDS",
        "a worker silent for this long is not connected any more, 1 to 86400 [default: 300]",
    ),
    setting(
        "WORKER_SSE_FANOUT",
        "worker-sse-fanout",
        "COUNT",
        "to how many of the matching workers a task is offered first, 1 to 1000, or all [default: all]",
    ),
    setting(
        "WORKER_SSE_WINDOW",
        "worker-sse-window",
        "COUNT",
        "announcements that may be outstanding on one stream, 1 to 1000 [default: 128]",
    ),
    setting(
        "WORKER_SSE_MAX_AGE",
        "worker-sse-max-age",
        "SECONDS",
        "streams of workers that hold no task end at about this age and are opened anew, 0 (never) to 604800 [default: 3600]",
    ),
    setting(
        "TASKWIRE_LEASE_SECONDS",
        "lease-seconds",
        "SECONDS",
        "how long a claim lives without a sign of life of its worker, 1 to 86400 [default: 60]",
    ),
    setting(
        "TASKWIRE_DRAIN_SECONDS",
        "drain-seconds",
        "SECONDS",
        "over how long streams are ended at shutdown, 0 to 600 [default: 10]",
    ),
    setting(
        "TASKWIRE_RETENTION_DAYS",
        "retention-days",
        "DAYS",
        "finished tasks older than this are pruned, 1 to 36500 [default: 30]",
    ),
    setting("TASKWIRE_LOG_FORMAT", "log-format", "FORMAT", "text or json [default: text]"),
];

const fn setting(
    env: &'static str,
    flag: &'static str,
    value: &'static str,
    help: &'static str,
) -> Setting {
    Setting { env, flag, value, help }
}

/// A value that must not be printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The value, for whoever needs it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For collectors.
    Json,
}

/// All settings, read and checked.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "`SETTINGS` documents each")]
pub struct Config {
    pub database_url: Option<Secret>,
    pub database_listen_url: Option<Secret>,
    pub bind: SocketAddr,
    pub data_dir: PathBuf,
    pub postgres_bin: Option<PathBuf>,
    pub sse_enabled: bool,
    pub keepalive: Duration,
    pub worker_timeout: Duration,
    pub fanout: Fanout,
    pub window: usize,
    pub max_age: Duration,
    pub lease: Duration,
    pub drain: Duration,
    pub retention_days: i32,
    pub log_format: LogFormat,
    /// `RUST_LOG`: which log lines, such as `info` or `taskwire=debug,worker_sse=debug`.
    pub log_filter: String,
}

/// Everything that is wrong with the settings, at once: nobody should mend them one start at a time.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError(Vec<String>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for ConfigError {}

/// Reads the process's environment, and `.env` for what is not set there.
pub fn environment() -> Result<impl Fn(&str) -> Option<String>, ConfigError> {
    let mut file = std::collections::HashMap::new();
    match dotenvy::dotenv_iter() {
        Ok(pairs) => {
            for pair in pairs {
                let (name, value) = pair.map_err(|error| {
                    ConfigError(vec![format!("the file .env cannot be read: {error}")])
                })?;
                file.entry(name).or_insert(value);
            }
        }
        Err(error) if error.not_found() => {}
        Err(error) => {
            return Err(ConfigError(vec![format!("the file .env cannot be read: {error}")]));
        }
    }
    #[expect(clippy::disallowed_methods, reason = "this is the one reader of the environment")]
    Ok(move |name: &str| std::env::var(name).ok().or_else(|| file.get(name).cloned()))
}

impl Config {
    /// Reads every setting from `lookup`, which knows them by their names in the environment.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let mut read = Reader { lookup, errors: Vec::new() };
        let secret = |text: Option<String>| text.as_deref().map(Secret::from);
        let config = Self {
            database_url: secret(read.text("DATABASE_URL")),
            database_listen_url: secret(read.text("DATABASE_LISTEN_URL")),
            bind: read.parsed(
                "TASKWIRE_BIND",
                "an address with a port, such as 127.0.0.1:8000",
                SocketAddr::from(([127, 0, 0, 1], 8000)),
            ),
            data_dir: read.text("TASKWIRE_DATA_DIR").unwrap_or_else(|| ".taskwire".into()).into(),
            postgres_bin: read.text("TASKWIRE_POSTGRES_BIN").map(Into::into),
            sse_enabled: read.choice(
                "WORKER_SSE_ENABLED",
                &[("true", true), ("1", true), ("false", false), ("0", false)],
                true,
            ),
            keepalive: read.seconds("WORKER_SSE_KEEPALIVE", 1, 3600, 30),
            worker_timeout: read.seconds("WORKER_SSE_TIMEOUT", 1, 86_400, 300),
            fanout: read.fanout("WORKER_SSE_FANOUT", 1, 1000),
            window: read.number("WORKER_SSE_WINDOW", 1, 1000, 128),
            max_age: read.seconds("WORKER_SSE_MAX_AGE", 0, 604_800, 3_600),
            lease: read.seconds("TASKWIRE_LEASE_SECONDS", 1, 86_400, 60),
            drain: read.seconds("TASKWIRE_DRAIN_SECONDS", 0, 600, 10),
            retention_days: read.number("TASKWIRE_RETENTION_DAYS", 1, 36_500, 30),
            log_format: read.choice(
                "TASKWIRE_LOG_FORMAT",
                &[("text", LogFormat::Text), ("json", LogFormat::Json)],
                LogFormat::Text,
            ),
            log_filter: read.text("RUST_LOG").unwrap_or_else(|| "info".to_owned()),
        };
        for (name, url) in [
            ("DATABASE_URL", &config.database_url),
            ("DATABASE_LISTEN_URL", &config.database_listen_url),
        ] {
            let known = |url: &Secret| {
                ["postgres://", "postgresql://"].iter().any(|s| url.reveal().starts_with(s))
            };
            if url.as_ref().is_some_and(|url| !known(url)) {
                read.errors.push(format!("{name} must begin with postgres:// or postgresql://"));
            }
        }
        if config.database_url.is_none() && config.database_listen_url.is_some() {
            read.errors.push("DATABASE_LISTEN_URL goes with DATABASE_URL, which is not set".into());
        }
        if read.errors.is_empty() { Ok(config) } else { Err(ConfigError(read.errors)) }
    }
}

struct Reader<L> {
    lookup: L,
    errors: Vec<String>,
}

impl<L: Fn(&str) -> Option<String>> Reader<L> {
    /// A set but empty variable counts as not set, as in `docker-compose.yml`'s `${NAME:-}`.
    fn text(&self, name: &str) -> Option<String> {
        (self.lookup)(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    fn parsed<T: FromStr>(&mut self, name: &str, expected: &str, default: T) -> T {
        let Some(text) = self.text(name) else {
            return default;
        };
        text.parse().unwrap_or_else(|_| {
            self.errors.push(format!("{name} is `{text}`, but must be {expected}"));
            default
        })
    }

    fn number<T>(&mut self, name: &str, min: T, max: T, default: T) -> T
    where
        T: Copy + PartialOrd + FromStr + fmt::Display,
    {
        let Some(text) = self.text(name) else {
            return default;
        };
        match text.parse() {
            Ok(number) if min <= number && number <= max => number,
            _ => {
                self.errors.push(format!(
                    "{name} is `{text}`, but must be a whole number, {min} to {max}"
                ));
                default
            }
        }
    }

    fn seconds(&mut self, name: &str, min: u64, max: u64, default: u64) -> Duration {
        Duration::from_secs(self.number(name, min, max, default))
    }

    fn fanout(&mut self, name: &str, min: u32, max: u32) -> Fanout {
        let Some(text) = self.text(name).filter(|text| !text.eq_ignore_ascii_case("all")) else {
            return Fanout::All;
        };
        match text.parse() {
            Ok(count) if (min..=max).contains(&count) => Fanout::First(count),
            _ => {
                self.errors.push(format!(
                    "{name} is `{text}`, but must be all, or a whole number, {min} to {max}"
                ));
                Fanout::All
            }
        }
    }

    fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)], default: T) -> T {
        let Some(text) = self.text(name) else {
            return default;
        };
        let lower = text.to_ascii_lowercase();
        if let Some((_, value)) = choices.iter().find(|(word, _)| *word == lower) {
            return *value;
        }
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        self.errors.push(format!("{name} is `{text}`, but must be {}", words.join(" or ")));
        default
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::read(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn nothing_set_is_a_working_server() {
        let config = read(&[]).unwrap();
        assert_eq!(config.bind.to_string(), "127.0.0.1:8000");
        assert_eq!(config.keepalive.as_secs(), 30);
        assert_eq!(config.worker_timeout.as_secs(), 300);
        assert_eq!(config.window, 128);
        assert_eq!(config.max_age.as_secs(), 3_600);
        assert!(config.sse_enabled && config.database_url.is_none());
    }

    #[test]
    fn every_wrong_value_is_named_at_once() {
        let wrong = [
            ("DATABASE_URL", "mysql://x"),
            ("TASKWIRE_BIND", "8000"),
            ("WORKER_SSE_ENABLED", "yes please"),
            ("WORKER_SSE_KEEPALIVE", "0"),
            ("WORKER_SSE_TIMEOUT", "-1"),
            ("WORKER_SSE_FANOUT", "some"),
            ("WORKER_SSE_WINDOW", "many"),
            ("WORKER_SSE_MAX_AGE", "-5"),
            ("TASKWIRE_LEASE_SECONDS", "1.5"),
            ("TASKWIRE_DRAIN_SECONDS", "601"),
            ("TASKWIRE_RETENTION_DAYS", "0"),
            ("TASKWIRE_LOG_FORMAT", "xml"),
        ];
        let text = read(&wrong).unwrap_err().to_string();
        for (name, _) in wrong {
            assert!(text.contains(name), "{name} in: {text}");
        }
        assert_eq!(text.lines().count(), wrong.len());
    }

    #[test]
    fn a_task_is_offered_to_all_or_to_a_number_of_workers_first() {
        let fanout = |text| read(&[("WORKER_SSE_FANOUT", text)]).map(|config| config.fanout);
        for all in ["", "all", "ALL"] {
            assert_eq!(fanout(all), Ok(Fanout::All));
        }
        assert_eq!(fanout("1"), Ok(Fanout::First(1)));
        assert_eq!(fanout("1000"), Ok(Fanout::First(1000)));
        for wrong in ["0", "1001", "-1", "3.5", "none", "all 3"] {
            let text = fanout(wrong).unwrap_err().to_string();
            assert!(text.contains("must be all, or a whole number, 1 to 1000"), "{text}");
        }
    }

    #[test]
    fn a_database_url_is_never_printed() {
        let config = read(&[("DATABASE_URL", "postgres://me:hunter2@db/x")]).unwrap();
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
