//! `GET /v1/tasks/{id}/events`: one task, followed to its end by a producer or a browser.

use std::convert::Infallible;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use futures_util::{StreamExt, future, stream};
use tokio::sync::watch::Receiver;

use super::App;
use super::extract::{TaskInPath, header};
use super::problem::Problem;
use super::room::StreamPlace;
use super::stream::stream_headers;
use crate::domain::TaskId;
use crate::push::frames::{self, End};
use crate::push::watch::Seen;
use crate::shutdown::Stage;
use crate::store::{StoreError, TaskView};

/// Wait after Postgres did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(500);

pub(super) fn router() -> Router<App> {
    Router::new().route("/v1/tasks/{id}/events", get(follow))
}

async fn follow(
    State(app): State<App>,
    TaskInPath(id): TaskInPath,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Some(task) = app.store.task_watch(&[id]).await?.pop() else {
        return Err(Problem::TaskNotFound(id.to_string()));
    };
    // A browser's EventSource connects again after every end, unless it is told that nothing is left.
    if header(&headers, "last-event-id")? == Some(frames::ENDED_ID) && task.status.is_end() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    if app.shutdown.is_draining() {
        return Err(Problem::Draining);
    }
    let place = app.room.enter_stream().ok_or(Problem::TooManyStreams)?;
    let seen = app.watch.follow(task).ok_or(Problem::Store(StoreError::Busy))?;
    let first = frames::retry(rand::random_range(frames::RETRY_MS));
    let follower = Follower { app, id, seen, told: None, has_ended: false, _place: place };
    let rest = stream::unfold(follower, async |mut follower| {
        let frame = follower.next().await?;
        Some((frame, follower))
    });
    let frames = stream::once(future::ready(first)).chain(rest).map(Ok::<_, Infallible>);
    Ok((stream_headers(), Body::from_stream(frames)).into_response())
}

/// Who follows a task, and what it was told of it last.
struct Follower {
    app: App,
    id: TaskId,
    seen: Receiver<Seen>,
    told: Option<TaskView>,
    has_ended: bool,
    _place: StreamPlace,
}

impl Follower {
    async fn next(&mut self) -> Option<Bytes> {
        if self.has_ended {
            return None;
        }
        let keepalive = self.app.streams.keepalive;
        let news = tokio::time::timeout(keepalive, self.news()).await;
        Some(news.unwrap_or_else(|_| frames::keepalive()))
    }

    async fn news(&mut self) -> Bytes {
        loop {
            let seen = self.seen.borrow_and_update().clone();
            match seen {
                Seen::Gone => {
                    self.has_ended = true;
                    return End::TaskDeleted.frame();
                }
                Seen::At(view) if view.status.is_end() => {
                    if let Some(last) = self.end().await {
                        return last;
                    }
                }
                Seen::At(view) => {
                    let told = self.told.replace(view.clone());
                    match told {
                        Some(told) if told == view => {}
                        Some(told) if frames::is_progress(&told, &view) => {
                            return frames::progress(&view);
                        }
                        _ => return frames::state(&view),
                    }
                }
            }
            let draining = self.app.shutdown.reached(Stage::Draining);
            tokio::select! {
                changed = self.seen.changed() => {
                    if changed.is_ok() {
                        continue;
                    }
                }
                () = draining => {}
            }
            self.has_ended = true;
            return End::Draining.frame();
        }
    }

    /// The task has ended: its last state is read whole. `None`: it has begun anew in between, or cannot
    /// be read now.
    async fn end(&mut self) -> Option<Bytes> {
        let last = match self.app.store.task_get(self.id).await {
            Ok(Some(task)) if task.status.is_end() => frames::ended(&task),
            Ok(None) => End::TaskDeleted.frame(),
            Ok(Some(_)) => return None,
            Err(_) => {
                tokio::time::sleep(RETRY_AFTER).await;
                self.seen.mark_changed();
                return None;
            }
        };
        self.has_ended = true;
        Some(last)
    }
}
