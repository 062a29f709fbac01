//! What a request says: who calls, with which parameters, and its JSON.

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use axum::http::request::Parts;
use bytes::BytesMut;
use futures_util::StreamExt;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::error::Category;
use tokio::sync::{Semaphore, SemaphorePermit};
use uuid::Uuid;

use super::App;
use super::problem::Problem;
use super::request_body::BodyError;
use crate::domain::limits::{BODY_BYTES_MAX, Invalid};
use crate::domain::{TaskId, WorkerId};
use crate::store::StoreError;

/// Bytes of a body beyond its limit that are read only so that its sender gets to hear the answer.
const DISCARDED_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The parameters of the query. Each may be given once, or twice with the same value.
#[derive(Debug)]
pub(super) struct Params(Vec<(String, String)>);

impl Params {
    /// The value of a parameter.
    pub(super) fn get(&self, name: &'static str) -> Result<Option<&str>, Problem> {
        one(name, self.0.iter().filter(|(key, _)| key == name).map(|(_, value)| value.as_str()))
    }

    /// Refuses what is not in `known`: a filter with a typo must not list everything.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), Problem> {
        match self.0.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            Some((key, _)) => Err(Problem::BadQuery(format!(
                "unknown parameter `{}`, expected one of: {}",
                crate::domain::limits::cut(key, 100),
                known.join(", ")
            ))),
            None => Ok(()),
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let pairs = Query::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        Ok(Self(pairs.map_err(|error| Problem::BadQuery(error.body_text()))?.0))
    }
}

/// A header's value, if it is given, once or with the same value again.
pub(super) fn header<'a>(
    headers: &'a HeaderMap,
    name: &'static str,
) -> Result<Option<&'a str>, Problem> {
    let mut values = Vec::new();
    for value in headers.get_all(name) {
        let text = value.to_str().map_err(|_| {
            Problem::BadParameter(Invalid::new(name, "may contain visible ASCII characters only"))
        })?;
        values.push(text);
    }
    one(name, values.into_iter())
}

/// The one value of header and query together.
pub(super) fn header_or_param<'a>(
    headers: &'a HeaderMap,
    header_name: &'static str,
    params: &'a Params,
    param_name: &'static str,
) -> Result<Option<&'a str>, Problem> {
    one(param_name, header(headers, header_name)?.into_iter().chain(params.get(param_name)?))
}

fn one<'a>(
    name: &'static str,
    mut values: impl Iterator<Item = &'a str>,
) -> Result<Option<&'a str>, Problem> {
    let Some(first) = values.next() else {
        return Ok(None);
    };
    if values.any(|other| other != first) {
        return Err(Problem::BadParameter(Invalid::new(
            name,
            "is given more than once, with different values",
        )));
    }
    Ok(Some(first))
}

/// The one door for identity: who calls, in whatever spelling (protocol S1). Every handler that
/// serves a worker takes it from here, so that tokens can be added here and nowhere else.
#[derive(Debug)]
pub(super) struct Caller {
    claimed: Option<WorkerId>,
    app: App,
}

impl Caller {
    /// The calling worker; `in_body` is the body's `worker_id`, if it has one.
    pub(super) fn worker(&self, in_body: Option<&str>) -> Result<WorkerId, Problem> {
        self.worker_if_named(in_body)?.ok_or(Problem::WorkerIdMissing)
    }

    /// The calling worker, if the call names one.
    pub(super) fn worker_if_named(
        &self,
        in_body: Option<&str>,
    ) -> Result<Option<WorkerId>, Problem> {
        let in_body = in_body.map(WorkerId::parse).transpose().map_err(Problem::Invalid)?;
        let worker = match (&self.claimed, in_body) {
            (Some(outer), Some(inner)) if *outer != inner => return Err(Problem::WorkerIdConflict),
            (Some(worker), _) => Some(worker.clone()),
            (None, inner) => inner,
        };
        if let Some(worker) = &worker {
            self.app.seen.note(worker);
        }
        Ok(worker)
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let params = Params::from_request_parts(parts, app).await?;
        let spellings = [
            params.get("worker_id")?,
            header(&parts.headers, "x-worker-id")?,
            header(&parts.headers, "worker_id")?,
        ];
        let mut named = spellings.into_iter().flatten();
        let first = named.next();
        if named.any(|other| Some(other) != first) {
            return Err(Problem::WorkerIdConflict);
        }
        let claimed = first.map(WorkerId::parse).transpose().map_err(Problem::BadParameter)?;
        Ok(Self { claimed, app: app.clone() })
    }
}

/// The id of a task in the path. What is no UUID is the id of no task.
#[derive(Debug)]
pub(super) struct TaskInPath(pub(super) TaskId);

impl<S: Send + Sync> FromRequestParts<S> for TaskInPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|error| Problem::BadQuery(error.body_text()))?;
        parse_task_id(&text).map(Self)
    }
}

/// Reads a task's id.
pub(super) fn parse_task_id(text: &str) -> Result<TaskId, Problem> {
    match Uuid::try_parse(text) {
        Ok(id) => Ok(TaskId(id)),
        Err(_) => Err(Problem::TaskNotFound(crate::domain::limits::cut(text, 100).to_owned())),
    }
}

/// The id of a worker in the path.
#[derive(Debug)]
pub(super) struct WorkerInPath(pub(super) WorkerId);

impl<S: Send + Sync> FromRequestParts<S> for WorkerInPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|error| Problem::BadQuery(error.body_text()))?;
        WorkerId::parse(&text)
            .map(Self)
            .map_err(|_| Problem::WorkerNotFound(crate::domain::limits::cut(&text, 100).to_owned()))
    }
}

/// A JSON body.
#[derive(Debug)]
pub(super) struct JsonBody<T>(pub(super) T);

/// A JSON body that may be left out.
#[derive(Debug)]
pub(super) struct MaybeJsonBody<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        parse_object(&read_json(request, BODY_BYTES_MAX).await?).map(Self)
    }
}

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for MaybeJsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (head, body) = request.into_parts();
        let bytes = read(&head.headers, body, BODY_BYTES_MAX, |_| Ok(())).await?;
        if bytes.trim_ascii().is_empty() {
            return Ok(Self(T::default()));
        }
        check_is_json(&head.headers)?;
        parse_object(&bytes).map(Self)
    }
}

/// The bytes of a body that says that it is JSON.
pub(super) async fn read_json(request: Request, bytes_max: usize) -> Result<Bytes, Problem> {
    let (head, body) = request.into_parts();
    check_is_json(&head.headers)?;
    read(&head.headers, body, bytes_max, |_| Ok(())).await
}

/// The bytes of a large body that says that it is JSON, with what they take of the room for such bodies.
/// It is taken as they arrive: who sends slowly, or only announces much, holds up nobody.
pub(super) async fn read_large_json(
    request: Request,
    bytes_max: usize,
    kib_left: &Semaphore,
) -> Result<(Bytes, Vec<SemaphorePermit<'_>>), Problem> {
    let (head, body) = request.into_parts();
    check_is_json(&head.headers)?;
    let mut taken = Vec::new();
    let (mut paid, mut count) = (0, 0);
    let bytes = read(&head.headers, body, bytes_max, |more| {
        count += more;
        let kib = u32::try_from((count.div_ceil(1024)) - paid).unwrap_or(u32::MAX);
        let permit = kib_left.try_acquire_many(kib);
        taken.push(permit.map_err(|_| Problem::Store(StoreError::Busy))?);
        paid += kib as usize;
        Ok(())
    })
    .await?;
    Ok((bytes, taken))
}

/// A page on the web can make a browser post forms and plain text to any server that the browser
/// reaches, but not JSON: so only what says that it is JSON is taken for it.
fn check_is_json(headers: &HeaderMap) -> Result<(), Problem> {
    let text = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_json =
        kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"));
    if is_json { Ok(()) } else { Err(Problem::NotJson) }
}

/// Reads a whole body. What is too much is read on for a while and thrown away: a connection that is
/// closed on a client in the middle of its sending loses the answer.
async fn read(
    headers: &HeaderMap,
    body: Body,
    bytes_max: usize,
    mut keep: impl FnMut(usize) -> Result<(), Problem>,
) -> Result<Bytes, Problem> {
    let discarded_max = bytes_max + DISCARDED_BYTES_MAX;
    let announced = headers
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse::<u64>().ok());
    let waits_for_leave = headers.contains_key(EXPECT);
    let refuse_above = if waits_for_leave { bytes_max } else { discarded_max };
    if announced.is_some_and(|bytes| bytes > refuse_above as u64) {
        return Err(Problem::TooLarge { bytes_max });
    }
    let (mut bytes, mut count) = (BytesMut::new(), 0);
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(unreadable)?;
        count += chunk.len();
        if count <= bytes_max {
            keep(chunk.len())?;
            bytes.extend_from_slice(&chunk);
        } else if count <= discarded_max {
            bytes = BytesMut::new();
        } else {
            break;
        }
    }
    if count > bytes_max {
        return Err(Problem::TooLarge { bytes_max });
    }
    Ok(bytes.freeze())
}

fn unreadable(error: axum::Error) -> Problem {
    match error.into_inner().downcast_ref() {
        Some(BodyError::Silent) => Problem::BodyStalled,
        _ => Problem::BodyUnreadable,
    }
}

/// Reads JSON; tells broken JSON from JSON of another form.
pub(super) fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Problem> {
    serde_json::from_slice(bytes).map_err(|error| match error.classify() {
        Category::Data => Problem::InvalidBody(error.to_string()),
        Category::Syntax | Category::Eof | Category::Io => {
            Problem::MalformedJson(error.to_string())
        }
    })
}

/// Whether a text of JSON is an object, if it is JSON at all.
pub(super) fn is_object(json: &[u8]) -> bool {
    json.trim_ascii_start().starts_with(b"{")
}

/// Reads a JSON object. serde would also take a list for a struct, by the order of its fields.
pub(super) fn parse_object<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    if !is_object(bytes) {
        parse::<IgnoredAny>(bytes)?;
        return Err(Problem::InvalidBody("expected a JSON object".to_owned()));
    }
    parse(bytes)
}
