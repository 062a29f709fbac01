//! The file that PostgreSQL and its guard write to, `postgres.log`.

use super::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// At the start of a guard, a longer log becomes `postgres.log.old`, in bytes.
const LONGEST: u64 = 10 * 1024 * 1024;

/// How much of the end is looked at for an error message, in bytes.
const TAIL: u64 = 64 * 1024;

/// How many of the last lines an error message quotes.
const QUOTED_LINES: usize = 6;

/// Statements with data of users can be in it.
const MODE: u32 = 0o600;

/// The log file.
#[derive(Clone, Debug)]
pub(super) struct Log {
    path: PathBuf,
}

impl Log {
    /// The log at `path`, which need not be there.
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts a long log aside. Whoever has it open goes on writing there.
    pub(super) fn rotate(&self) {
        if self.length() > LONGEST {
            // A log that cannot be put aside is only long.
            let _ = fs::rename(&self.path, self.path.with_extension("log.old"));
        }
    }

    /// Opens it for appending. PostgreSQL gets it as an open file, so that its user needs no
    /// rights on the folder.
    pub(super) fn open(&self) -> Result<File, Error> {
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(MODE)
            .open(&self.path)
            .map_err(|error| Error::io("open", &self.path, &error))
    }

    /// How long it is now, in bytes; for [`Log::since`].
    pub(super) fn length(&self) -> u64 {
        fs::metadata(&self.path).map_or(0, |metadata| metadata.len())
    }

    /// What was written after it was `length` bytes long, without what is very far back.
    pub(super) fn since(&self, length: u64) -> String {
        let start = length.max(self.length().saturating_sub(TAIL));
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(start))?;
            let mut bytes = Vec::new();
            file.take(TAIL).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
    }

    /// Writes a line of the guard. A log that cannot be written, as on a full disk, must not
    /// keep the guard from its work.
    pub(super) fn note(&self, text: &str) {
        let line = format!("{} [{}] taskwire guard: {text}\n", now(), std::process::id());
        if let Ok(mut file) = self.open() {
            let _ = file.write_all(line.as_bytes());
        }
    }
}

/// The last lines of a program's output, as the end of an error sentence.
pub(super) fn quote(output: &str) -> String {
    let lines: Vec<&str> = output.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(QUOTED_LINES)..];
    if last.is_empty() { String::new() } else { format!("\n  {}", last.join("\n  ")) }
}

/// The time in the form PostgreSQL writes it, by Howard Hinnant's algorithm for civil dates:
/// this module does without a library for dates.
fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    civil(since.as_secs(), since.subsec_millis())
}

fn civil(seconds: u64, milliseconds: u32) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{milliseconds:03} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        assert_eq!(civil(0, 0), "1970-01-01 00:00:00.000 UTC");
        assert_eq!(civil(951_782_400, 7), "2000-02-29 00:00:00.007 UTC");
        assert_eq!(civil(1_767_225_599, 999), "2025-12-31 23:59:59.999 UTC");
    }

    #[test]
    fn quotes_only_the_last_lines() {
        assert_eq!(quote("\n\n"), "");
        assert_eq!(quote("1\n2\n3\n4\n5\n6\n\n7\n"), "\n  2\n  3\n  4\n  5\n  6\n  7");
    }
}
