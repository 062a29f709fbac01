//! JSON that somebody wrote by SQL. Postgres takes numbers of any size and any depth, which a reader need
//! not: such a value must spoil neither the row that it stands in nor the rows around it.

use serde_json::{Value, json};
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgTypeInfo, PgValueRef};
use sqlx::types::Json;
use sqlx::{Decode, Postgres, Type};

/// A column of it. What cannot be read becomes an object that says so.
#[derive(Debug)]
pub(super) struct Lenient(Value);

impl Type<Postgres> for Lenient {
    fn type_info() -> PgTypeInfo {
        Json::<Value>::type_info()
    }

    fn compatible(info: &PgTypeInfo) -> bool {
        Json::<Value>::compatible(info)
    }
}

impl<'r> Decode<'r, Postgres> for Lenient {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        let read = Json::<Value>::decode(value);
        Ok(Self(
            read.map_or_else(|error| json!({ "unreadable": error.to_string() }), |json| json.0),
        ))
    }
}

impl From<Lenient> for Value {
    fn from(lenient: Lenient) -> Self {
        lenient.0
    }
}
