//! Every limit on what users send (protocol E2), and the checks that name them.

use std::fmt;

use serde_json::Value;

/// Characters of an id that people choose: worker, codebase, capability.
pub const ID_CHARS_MAX: usize = 128;
/// Characters of a worker's (agent's) name.
pub const NAME_CHARS_MAX: usize = 128;
/// Characters of a task's title.
pub const TITLE_CHARS_MAX: usize = 500;
/// Bytes of a task's prompt.
pub const PROMPT_BYTES_MAX: usize = 1024 * 1024;
/// Bytes of each of metadata, result and checkpoint, as JSON.
pub const JSON_BYTES_MAX: usize = 256 * 1024;
/// Bytes of an error text that a worker reports; longer ones are cut, not refused.
pub const ERROR_BYTES_MAX: usize = 64 * 1024;
/// Bytes of a heartbeat's message.
pub const MESSAGE_BYTES_MAX: usize = 4 * 1024;
/// Claims that one call completes, at most.
pub const COMPLETES_MAX: usize = 1_000;
/// Tasks that one call may claim.
pub const CLAIM_TASKS_MAX: i64 = 1_000;
/// Seconds that a call may wait for a task to claim.
pub const CLAIM_WAIT_SECONDS_MAX: f64 = 60.0;
/// Tasks that a worker may be given at a time by its stream.
pub const SLOTS_MAX: usize = 1000;
/// Bytes of a cancellation's reason.
pub const REASON_BYTES_MAX: usize = 1000;
/// Bytes of an `Idempotency-Key`.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;
/// Bytes of a worker's hostname.
pub const HOSTNAME_CHARS_MAX: usize = 255;
/// Codebases of one worker.
pub const CODEBASES_MAX: usize = 500;
/// Capabilities of one worker, and required capabilities of one task.
pub const CAPABILITIES_MAX: usize = 100;
/// Attempts that a task may ask for.
pub const ATTEMPTS_MAX: i32 = 1000;
/// Seconds that one attempt may be given: a year.
pub const TIMEOUT_SECONDS_MAX: i32 = 31_536_000;
/// Seconds that a worker may ask to wait before the next attempt: a day.
pub const RETRY_AFTER_SECONDS_MAX: f64 = 86_400.0;
/// Tasks in one batch.
pub const BATCH_TASKS_MAX: usize = 10_000;
/// Bytes of a request's body.
pub const BODY_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Bytes of a batch's body.
pub const BATCH_BODY_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Tasks on one page of a listing.
pub const PAGE_TASKS_MAX: i64 = 1000;

/// A value that cannot be accepted: which one, and what would be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The field, as the client wrote it.
    pub field: &'static str,
    /// What is wrong and what would be right, as the rest of a sentence that begins with the field.
    pub detail: String,
}

impl Invalid {
    /// `detail` goes on where the field's name ends: "must be …".
    pub fn new(field: &'static str, detail: impl Into<String>) -> Self {
        Self { field, detail: detail.into() }
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {}", self.field, self.detail)
    }
}

impl std::error::Error for Invalid {}

/// 1 to 128 of `[A-Za-z0-9._:/@-]`; the SQL function `taskwire_is_id` says the same.
#[must_use]
pub fn is_id(text: &str) -> bool {
    (1..=ID_CHARS_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:/@-".contains(&b))
}

/// Checks an id that somebody chose.
pub fn check_id(field: &'static str, text: &str) -> Result<(), Invalid> {
    if is_id(text) {
        return Ok(());
    }
    Err(Invalid::new(
        field,
        format!("must be 1 to {ID_CHARS_MAX} characters of A-Z a-z 0-9 . _ : / @ -"),
    ))
}

/// Checks the name of a worker: any text on one line.
pub fn check_name(field: &'static str, name: &str) -> Result<(), Invalid> {
    if (1..=NAME_CHARS_MAX).contains(&name.chars().count()) && !name.chars().any(char::is_control) {
        return Ok(());
    }
    Err(Invalid::new(
        field,
        format!("must be 1 to {NAME_CHARS_MAX} characters without control characters"),
    ))
}

/// Checks a list of ids, and puts it into the one form in which it is stored: sorted, no repeats.
pub fn check_ids(
    field: &'static str,
    mut ids: Vec<String>,
    count_max: usize,
) -> Result<Vec<String>, Invalid> {
    ids.sort_unstable();
    ids.dedup();
    if ids.len() > count_max {
        return Err(Invalid::new(field, format!("may have at most {count_max} entries")));
    }
    for id in &ids {
        check_id(field, id)?;
    }
    Ok(ids)
}

/// Checks a text's length in bytes, and that Postgres can hold it.
pub fn check_text(field: &'static str, text: &str, bytes_max: usize) -> Result<(), Invalid> {
    if text.len() > bytes_max {
        return Err(Invalid::new(field, format!("may have at most {bytes_max} bytes")));
    }
    check_no_nul(field, text)
}

/// Postgres' text cannot hold the character NUL.
pub fn check_no_nul(field: &'static str, text: &str) -> Result<(), Invalid> {
    if text.contains('\0') {
        return Err(Invalid::new(field, "contains the character U+0000, which cannot be stored"));
    }
    Ok(())
}

/// Checks a JSON value's size as text in Postgres, and that Postgres' jsonb can hold it.
pub fn check_json(field: &'static str, value: &Value) -> Result<(), Invalid> {
    fn has_nul(value: &Value) -> bool {
        match value {
            Value::String(text) => text.contains('\0'),
            Value::Array(items) => items.iter().any(has_nul),
            Value::Object(fields) => {
                fields.iter().any(|(key, value)| key.contains('\0') || has_nul(value))
            }
            _ => false,
        }
    }
    if has_nul(value) {
        return Err(Invalid::new(field, "contains the character U+0000, which cannot be stored"));
    }
    if has_reserved_key(value) {
        return Err(Invalid::new(
            field,
            format!("contains the key `{RESERVED_KEY}`, which cannot be read back"),
        ));
    }
    if value.to_string().len() + unfolded_bytes(value) > JSON_BYTES_MAX {
        return Err(Invalid::new(
            field,
            format!("may have at most {JSON_BYTES_MAX} bytes of JSON"),
        ));
    }
    Ok(())
}

/// `serde_json` reads an object that begins with this key as the JSON in its text, and fails where
/// that is none. Once stored, nothing that lists it could be read any more.
const RESERVED_KEY: &str = "$serde_json::private::RawValue";

/// Whether the key stands anywhere: Postgres orders keys anew, so any one may come to be the first.
fn has_reserved_key(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(has_reserved_key),
        Value::Object(fields) => {
            fields.iter().any(|(key, value)| key == RESERVED_KEY || has_reserved_key(value))
        }
        _ => false,
    }
}

/// Bytes that a value's numbers gain in Postgres, which writes 1e308 with all of its 309 digits.
fn unfolded_bytes(value: &Value) -> usize {
    match value {
        Value::Number(number) => number.as_f64().map_or(0, |number| {
            let is_unfolded = number != 0.0 && !(1e-5..1e16).contains(&number.abs());
            // `Display` of a float writes all digits too.
            if is_unfolded { number.to_string().len() } else { 0 }
        }),
        Value::Array(items) => items.iter().map(unfolded_bytes).sum(),
        Value::Object(fields) => fields.values().map(unfolded_bytes).sum(),
        _ => 0,
    }
}

/// The first `bytes_max` bytes of a text, cut between characters.
#[must_use]
pub fn cut(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_short_and_plain() {
        for good in ["a", "my-project", "team/repo@v1.2:x", &"x".repeat(128)] {
            assert!(is_id(good), "{good}");
        }
        for bad in ["", " ", "a b", "a,b", "ä", "a\n", &"x".repeat(129)] {
            assert!(!is_id(bad), "{bad}");
        }
    }

    #[test]
    fn json_with_nul_anywhere_is_refused() {
        for bad in [r#""a\u0000""#, r#"{"a\u0000":1}"#, r#"[{"a":["\u0000"]}]"#] {
            let value: Value = serde_json::from_str(bad).unwrap();
            assert!(check_json("metadata", &value).is_err(), "{bad}");
        }
        assert!(check_json("metadata", &serde_json::json!({"a": "\\u0000"})).is_ok());
    }

    #[test]
    fn a_cut_text_ends_between_characters() {
        assert_eq!(cut("aä", 2), "a");
        assert_eq!(cut("aä", 3), "aä");
        assert_eq!(cut("", 3), "");
    }
}
