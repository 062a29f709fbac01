//! Programs of other projects that some tests need, and a user's machine may lack.

use std::env;
use std::path::PathBuf;

/// Debian keeps servers here, and leaves it out of a user's `PATH`.
const SERVERS: &str = "/usr/sbin";

/// Where a program is. `None`: it is not here, and the test is to be skipped; a line says so.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain([PathBuf::from(SERVERS)]);
    let found = folders.map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        skip(&format!("needs {name}, which is neither in PATH nor in {SERVERS}"));
    }
    found
}

/// Says that this test is skipped, and why.
///
/// # Panics
/// When `TASKWIRE_TEST_PROGRAMS` is `required`: where everything is installed nothing is skipped.
pub fn skip(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test").to_owned();
    let is_required = env::var_os("TASKWIRE_TEST_PROGRAMS").is_some_and(|is| is == "required");
    assert!(!is_required, "{test} {why}, and TASKWIRE_TEST_PROGRAMS=required");
    eprintln!("skipped: {test} {why}");
}
