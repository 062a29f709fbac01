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
use futures_util::stream;
use tokio::sync::watch::Receiver;

use super::App;
use super::extract::{TaskInPath, header};
use super::problem::Problem;
use super::stream::{RETRY_MS, stream_headers};
use crate::domain::TaskId;
use crate::push::frames;
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
    let Some(task) = app.store.task_get(id).await? else {
        return Err(Problem::TaskNotFound(id.to_string()));
    };
    // A browser's EventSource connects again after every end, unless it is told that nothing is left.
    if header(&headers, "last-event-id")? == Some(frames::ENDED_ID) && task.finished_at.is_some() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    if app.shutdown.is_draining() {
        return Err(Problem::Draining);
    }
    let seen = app.watch.follow(id).ok_or(Problem::Store(StoreError::Busy))?;
    let follower = Follower { app, id, seen, told: None, is_first: true, has_ended: false };
    let body = stream::unfold(follower, async |mut follower| {
        let frame = follower.next().await?;
        Some((Ok::<_, Infallible>(frame), follower))
    });
    Ok((stream_headers(), Body::from_stream(body)).into_response())
}

/// Who follows a task, and what it was told of it last.
struct Follower {
    app: App,
    id: TaskId,
    seen: Receiver<Seen>,
    told: Option<TaskView>,
    is_first: bool,
    has_ended: bool,
}

impl Follower {
    async fn next(&mut self) -> Option<Bytes> {
        if self.has_ended {
            return None;
        }
        if std::mem::take(&mut self.is_first) {
            return Some(frames::retry(rand::random_range(RETRY_MS)));
        }
        let frame = match tokio::time::timeout(self.app.streams.keepalive, self.news()).await {
            Ok(frame) => frame,
            Err(_) => frames::keepalive(),
        };
        Some(frame)
    }

    async fn news(&mut self) -> Bytes {
        loop {
            let seen = self.seen.borrow_and_update().clone();
            match seen {
                Seen::Unread => {}
                Seen::Gone => {
                    self.has_ended = true;
                    return frames::Unfollow::Deleted.frame();
                }
                Seen::At(view) if view.status.is_end() => return self.end().await,
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
            return frames::Unfollow::Draining.frame();
        }
    }

    /// The task has ended: its last state is read whole.
    async fn end(&mut self) -> Bytes {
        loop {
            match self.app.store.task_get(self.id).await {
                Ok(Some(task)) => {
                    self.has_ended = true;
                    return frames::ended(&task);
                }
                Ok(None) => {
                    self.has_ended = true;
                    return frames::Unfollow::Deleted.frame();
                }
                Err(_) => tokio::time::sleep(RETRY_AFTER).await,
            }
        }
    }
}
