//! The arrows in `src/lib.rs`, as a test: each layer only knows the ones below it.

use std::fs;
use std::path::{Path, PathBuf};

/// A folder, and what must not stand in its files.
const FORBIDDEN: [(&str, &[&str]); 5] = [
    (
        "src/domain",
        &[
            "axum::",
            "tokio::",
            "PgPool",
            "crate::store",
            "crate::http",
            "crate::push",
            "crate::maintenance",
        ],
    ),
    ("src/store", &["axum::", "crate::http", "crate::push", "crate::maintenance", "crate::config"]),
    ("src/push", &["axum::", "sqlx::", "crate::http", "crate::maintenance", "crate::config"]),
    // No handler pushes to a stream: it has the hub only to open and to end streams, and to say
    // that a worker acted.
    (
        "src/http",
        &["sqlx::", "hub.announce", "hub.deliver", "push::router", "push::inbox", "crate::config"],
    ),
    ("src/maintenance", &["axum::", "sqlx::", "crate::http", "crate::push", "crate::config"]),
];

#[test]
fn each_layer_only_knows_the_ones_below_it() {
    for (folder, words) in FORBIDDEN {
        assert!(!rust_files(Path::new(folder)).is_empty(), "{folder}");
        for file in rust_files(Path::new(folder)) {
            let text = fs::read_to_string(&file).unwrap();
            for (number, line) in text.lines().enumerate() {
                for word in words {
                    // The `sqlx::Type` derive of ids and states is how they reach their columns.
                    assert!(
                        !line.contains(word) || line.trim_start().starts_with("//"),
                        "{}:{}: {folder} must not use {word}",
                        file.display(),
                        number + 1,
                    );
                }
            }
        }
    }
}

#[test]
fn only_config_reads_the_environment_and_only_the_store_writes_sql() {
    for file in rust_files(Path::new("src")) {
        let text = fs::read_to_string(&file).unwrap();
        let is = |prefix: &str| file.starts_with(prefix);
        if !is("src/config.rs") && !is("src/embedded") {
            assert!(!text.contains("env::var("), "{}", file.display());
        }
        // The benchmark measures Postgres itself, besides.
        if !is("src/store") && !is("src/bench") {
            assert!(!text.contains("sqlx::query"), "{}", file.display());
        }
    }
}

#[test]
fn nothing_but_the_command_line_knows_of_the_benchmark() {
    for file in rust_files(Path::new("src")) {
        if file.starts_with("src/bench") || file.starts_with("src/cli") {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        assert!(!text.contains("crate::bench"), "{}", file.display());
    }
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            files.push(path);
        }
    }
    files
}
