//! What went wrong with Taskwire's own PostgreSQL, as a sentence a person can act on.

use std::fmt;
use std::io;
use std::path::Path;

/// Why Taskwire's own PostgreSQL could not be started or joined.
///
/// There is nothing a program could do differently for one reason or another, so this is only
/// the text for the person at the terminal.
#[derive(Debug)]
pub struct Error(String);

impl Error {
    /// An error that says `sentence`.
    pub(super) fn new(sentence: impl Into<String>) -> Self {
        Self(sentence.into())
    }

    /// The operating system refused: `doing` is what was tried, as in "create the folder".
    pub(super) fn io(doing: &str, path: &Path, source: &io::Error) -> Self {
        let hint = if source.kind() == io::ErrorKind::PermissionDenied {
            "; it was probably made by another user (root?): run Taskwire as that user, or give \
             it another data folder"
        } else {
            ""
        };
        Self(format!("Cannot {doing} {}: {source}{hint}.", path.display()))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Error {}
