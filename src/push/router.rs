//! Hints in, announcements out: looks the truth up, makes the frames once, and fans out.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::announcement::Announcement;
use super::frames::{self, End};
use super::held;
use super::hub::Hub;
use super::inbox::{Hints, Inbox};
use super::stream::{Refill, Stream};
use crate::domain::{ReplicaId, Routing, TaskId, WorkerId};
use crate::shutdown::Shutdown;
use crate::store::{PushTask, Ready, Store, StoreError, report};

/// Tasks that one statement looks up.
const LOOKUP_TASKS_MAX: usize = 200;
/// Streams that are looked at together.
const REFILL_STREAMS_MAX: usize = 500;
/// Backlogs that one statement reads: of so many workers, or ways to be routed.
const BACKLOGS_MAX: usize = 8;
/// Windows that a shared backlog would fill: some of it may be for certain workers alone.
const SHARED_WINDOWS: usize = 2;
/// Streams of one round that read a backlog of their own; more wait for the next round.
const ALONE_MAX: usize = 32;
/// Statements that read backlogs at the same time: a storm of reconnects leaves Postgres to claims.
const REFILLS_IN_FLIGHT: usize = 2;
/// Wait after Postgres did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(250);
/// Announcements that the sweep need not look up again.
const REMEMBERED_MAX: usize = 20_000;

/// The second half of the wake path.
#[derive(Clone)]
pub struct Router {
    store: Store,
    hub: Arc<Hub>,
    inbox: Arc<Inbox>,
    replica: ReplicaId,
    window_size: usize,
    looked_up: Arc<Mutex<LookedUp>>,
}

impl Router {
    /// A router; its two loops are to be run as tasks.
    #[must_use]
    pub fn new(
        store: Store,
        hub: Arc<Hub>,
        inbox: Arc<Inbox>,
        replica: ReplicaId,
        window_size: usize,
    ) -> Self {
        Self { store, hub, inbox, replica, window_size, looked_up: Arc::default() }
    }

    /// Announces what the inbox tells of, until shutdown.
    pub async fn run(self, shutdown: Shutdown) {
        while let Some(hints) = shutdown.until_stopping(self.inbox.take()).await {
            if let Err(error) = self.follow(hints).await {
                report("could not look tasks up, will look at everything", &error);
                tokio::time::sleep(RETRY_AFTER).await;
                self.inbox.add_everything();
            }
        }
    }

    async fn follow(&self, hints: Hints) -> Result<(), StoreError> {
        if hints.everything {
            self.hub.review_all();
        } else {
            self.hub.review_workers(&hints.workers);
        }
        if hints.all_codebases {
            self.hub.refill(None);
        } else if !hints.codebases.is_empty() {
            self.hub.refill(Some(&hints.codebases));
        }
        if !hints.cancels.is_empty() {
            let ids: Vec<_> = hints.cancels.into_iter().collect();
            for ids in ids.chunks(LOOKUP_TASKS_MAX) {
                self.tell_cancelled(ids, &[]).await?;
            }
        }
        if !hints.slots.is_empty() || !hints.came.is_empty() {
            held::check(&self.store, &self.hub, &hints.slots, &hints.came, true).await?;
        }
        self.announce(hints.tasks.into_iter().collect()).await
    }

    /// Looks tasks up and tells the streams that they are for.
    pub async fn announce(&self, ids: Vec<TaskId>) -> Result<(), StoreError> {
        self.look_up(&ids, |tasks| self.hub.announce(tasks)).await
    }

    /// The same for tasks that were told before.
    pub(super) async fn announce_again(&self, ids: Vec<TaskId>) -> Result<(), StoreError> {
        self.look_up(&ids, |tasks| self.hub.announce_again(tasks)).await
    }

    /// Offers tasks to more streams that were offered to few.
    pub(super) async fn widen(&self, ids: &[TaskId]) -> Result<(), StoreError> {
        self.look_up(ids, |tasks| tasks.iter().for_each(|task| self.hub.offer_to_more(task))).await
    }

    async fn look_up(
        &self,
        ids: &[TaskId],
        tell: impl Fn(&[Announcement]),
    ) -> Result<(), StoreError> {
        if self.hub.is_idle() {
            return Ok(());
        }
        for ids in ids.chunks(LOOKUP_TASKS_MAX) {
            let tasks = announcements(self.store.push_claimable(ids).await?);
            tell(&tasks);
            let mut looked_up = self.looked_up();
            for task in &tasks {
                looked_up.add(task.ready());
            }
        }
        Ok(())
    }

    /// Those of some ready tasks that were not looked up already, as the sweep asks.
    #[must_use]
    pub fn news(&self, ready: &[Ready]) -> Vec<TaskId> {
        let looked_up = self.looked_up();
        ready.iter().filter(|r| !looked_up.set.contains(r)).map(|r| r.id).collect()
    }

    fn looked_up(&self) -> MutexGuard<'_, LookedUp> {
        self.looked_up.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn tell_cancelled(
        &self,
        tasks: &[TaskId],
        workers: &[WorkerId],
    ) -> Result<(), StoreError> {
        let mut told = HashSet::new();
        for cancellation in self.store.push_cancelled(tasks, workers).await? {
            if let Ok(owner) = WorkerId::parse(&cancellation.worker_id) {
                self.hub.deliver(&owner, &frames::cancelled(&cancellation));
                told.insert((owner, cancellation.task_id));
            }
        }
        // A claim that was ended for its worker has left its slot.
        held::check(&self.store, &self.hub, &told, &HashSet::new(), false).await
    }

    /// Looks after streams that want it, until shutdown: new ones, ones with room for more, and all
    /// after a loss.
    pub async fn attend(self, shutdown: Shutdown) {
        let lane = async || {
            while let Some(streams) =
                shutdown.until_stopping(self.hub.next_attention(REFILL_STREAMS_MAX)).await
            {
                if let Err(error) = self.attend_to(&streams).await {
                    report("could not read backlogs, will try again", &error);
                    tokio::time::sleep(RETRY_AFTER).await;
                    self.hub.again(&streams);
                }
            }
        };
        futures_util::future::join_all((0..REFILLS_IN_FLIGHT).map(|_| lane())).await;
    }

    async fn attend_to(&self, streams: &[(Arc<Stream>, bool)]) -> Result<(), StoreError> {
        self.review(streams).await?;
        let (with_slots, others): (Vec<_>, Vec<_>) =
            streams.iter().map(|(stream, _)| stream).partition(|stream| stream.has_slots);
        self.fill(with_slots).await?;
        let mut by_routing: HashMap<_, Vec<_>> = HashMap::new();
        for stream in others {
            let Routing { codebases, capabilities, .. } = stream.routing();
            by_routing.entry((codebases, capabilities)).or_default().push(stream);
        }
        // Who is routed like nobody else here has nothing to share.
        let (mut alone, mut alike) = (Vec::new(), Vec::new());
        for (routing, group) in by_routing {
            if group.len() == 1 { alone.extend(group) } else { alike.push((routing, group)) }
        }
        for groups in alike.chunks(BACKLOGS_MAX) {
            alone.extend(self.refill_alike(groups).await?);
        }
        // The other lane takes its share of many.
        let own = alone.split_off(alone.len().min(ALONE_MAX));
        for stream in own {
            self.hub.refill_one(stream.connection_id);
        }
        for streams in alone.chunks(BACKLOGS_MAX) {
            self.refill_each(streams).await?;
        }
        Ok(())
    }

    /// Has the slots of streams filled. First it must be known what their workers hold.
    async fn fill(&self, streams: Vec<&Arc<Stream>>) -> Result<(), StoreError> {
        let (known, unknown): (Vec<_>, Vec<_>) =
            streams.into_iter().cloned().partition(|stream| stream.is_known());
        for stream in &known {
            self.hub.fill(stream);
        }
        held::look(&self.store, &self.hub, &unknown).await
    }

    /// Reads one backlog for all streams of a group, which are routed alike, and makes its frames once.
    /// Gives back those that are to read their own: what is for others of the group alone took the place
    /// of what is for them.
    async fn refill_alike<'a>(
        &self,
        groups: &[(Alike, Vec<&'a Arc<Stream>>)],
    ) -> Result<Vec<&'a Arc<Stream>>, StoreError> {
        let begun: Vec<Vec<_>> = groups
            .iter()
            .map(|(_, group)| group.iter().map(|stream| stream.refill_begin()).collect())
            .collect();
        // As they were grouped: one of them may have been routed anew since.
        let routings: Vec<_> = groups.iter().map(|(routing, _)| routing).collect();
        self.hub.count_backlog_read();
        let most = self.window_size * SHARED_WINDOWS;
        let limit = i64::try_from(most).unwrap_or(i64::MAX);
        let backlogs = self.store.push_backlog_shared(&routings, limit).await?;
        let mut crowded_out = Vec::new();
        for (((_, group), begun), backlog) in groups.iter().zip(begun).zip(backlogs) {
            let is_all = backlog.len() < most;
            let backlog = announcements(backlog);
            for (stream, begun) in group.iter().zip(begun) {
                if is_all || stream.matching(&backlog) >= self.window_size {
                    self.refill(stream, begun, &backlog, is_all);
                } else {
                    crowded_out.push(*stream);
                }
            }
        }
        Ok(crowded_out)
    }

    async fn refill_each(&self, streams: &[&Arc<Stream>]) -> Result<(), StoreError> {
        let workers: Vec<_> = streams.iter().map(|stream| stream.worker_id.clone()).collect();
        let begun: Vec<_> = streams.iter().map(|stream| stream.refill_begin()).collect();
        self.hub.count_backlog_read();
        let backlogs = self.store.push_backlog(&workers, self.limit()).await?;
        for ((stream, begun), backlog) in streams.iter().zip(begun).zip(backlogs) {
            let is_all = backlog.len() < self.window_size;
            self.refill(stream, begun, &announcements(backlog), is_all);
        }
        Ok(())
    }

    fn refill(&self, stream: &Stream, begun: Refill, backlog: &[Announcement], is_all: bool) {
        let (told, again) = stream.refill(begun, backlog, is_all);
        self.hub.count_announcements(told);
        if again {
            self.hub.refill_one(stream.connection_id);
        }
    }

    fn limit(&self) -> i64 {
        i64::try_from(self.window_size).unwrap_or(i64::MAX)
    }

    /// Ends streams that were superseded or whose worker is gone, routes the others as the worker's
    /// row says now, and gives lost presence back.
    async fn review(&self, streams: &[(Arc<Stream>, bool)]) -> Result<(), StoreError> {
        let asked: Vec<_> = streams.iter().filter(|(_, review)| *review).map(|(s, _)| s).collect();
        if asked.is_empty() {
            return Ok(());
        }
        let workers: Vec<_> = asked.iter().map(|stream| stream.worker_id.clone()).collect();
        // Whoever was away when a cancellation was said hears of it now.
        self.tell_cancelled(&[], &workers).await?;
        let mut absent = Vec::new();
        for (stream, review) in asked.into_iter().zip(self.store.stream_review(&workers).await?) {
            let Some(routing) = review.routing else {
                self.end(stream, End::Unregistered);
                continue;
            };
            match review.connection_id {
                Some(current) if current != stream.connection_id => {
                    self.end(stream, End::Superseded);
                    continue;
                }
                Some(_) => {}
                None => absent.push(stream),
            }
            self.hub.reroute(stream, &routing);
        }
        if !absent.is_empty() {
            let slots =
                |stream: &Stream| stream.slots().and_then(|count| i32::try_from(count).ok());
            let rows: Vec<_> = absent
                .iter()
                .map(|stream| (stream.worker_id.clone(), stream.connection_id, slots(stream)))
                .collect();
            self.store.stream_restore(self.replica, &rows).await?;
            // A stream that ended meanwhile found no row to end.
            let ids = rows.into_iter().map(|(worker, connection, _)| (worker, connection));
            self.hub.depart(ids.collect());
        }
        Ok(())
    }

    fn end(&self, stream: &Stream, why: End) {
        tracing::info!(
            target: "worker_sse", worker_id = %stream.worker_id, connection_id = %stream.connection_id,
            "stream ended: {}", why.code()
        );
        self.hub.end(stream, why);
    }
}

/// The codebases and capabilities that some streams have in common.
type Alike = (Vec<String>, Vec<String>);

fn announcements(backlog: Vec<PushTask>) -> Vec<Announcement> {
    backlog.into_iter().map(Announcement::new).collect()
}

/// What was looked up of late. Only spares work: to forget is harmless.
#[derive(Debug, Default)]
struct LookedUp {
    set: HashSet<Ready>,
    order: VecDeque<Ready>,
}

impl LookedUp {
    fn add(&mut self, ready: Ready) {
        if self.set.insert(ready) {
            self.order.push_back(ready);
            if self.order.len() > REMEMBERED_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.set.remove(&oldest);
            }
        }
    }
}
