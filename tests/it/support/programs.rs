//! Programs of others that some tests need.

use std::path::PathBuf;

/// Where a program is. A test that needs one which is not there is skipped, with a line that says so;
/// with `TASKWIRE_TEST_PROGRAMS=required`, as in CI, it fails.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    let found = folders.map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        let required = std::env::var_os("TASKWIRE_TEST_PROGRAMS").is_some_and(|v| v == "required");
        assert!(!required, "{name} is not installed");
        eprintln!("skipped: {name} is not installed");
    }
    found
}
