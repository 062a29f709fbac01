//! Claims for workers with slots (protocol S11): who is given what, made and pushed in tasks of their own.
//!
//! A task that has just become claimable goes to one stream of this replica that has a slot for it, by the
//! statement of all claims: claims for many workers share one. What waits is claimed from the backlog
//! by `task_claim_next`: one statement for all free slots of a stream, which reads, by the predicate and in the
//! order of every backlog, and claims at once. To read first and to claim each task by its id would be two
//! statements, and two replicas that read the same best tasks would take them from each other. Slots
//! that become free meanwhile wait for the next such statement, as requests do in group commit.
//!
//! Whatever fails, the task is where it was, in Postgres, and is offered again.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, RwLock, Semaphore};
use uuid::Uuid;

use super::announcement::Announcement;
use super::hub::Hub;
use super::inbox::Inbox;
use super::stream::Stream;
use crate::domain::{ConnectionId, Fence, TaskId, WorkerId};
use crate::metrics::Metrics;
use crate::shutdown::{Shutdown, jittered};
use crate::store::{Claim, ClaimAsk, FinishAsk, Store, StoreError, Verb, report};

/// Claims of new tasks that are being made at a time; with more, tasks wait in the backlog.
const CLAIMS_IN_FLIGHT: usize = 4_096;
/// Statements at a time that claim from the backlog: each holds a connection of the pool.
const FILLS_IN_FLIGHT: usize = 4;
/// A task whose claim failed, but not to another one, is offered again after this long.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Wait after Postgres did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(250);
/// How often it is tried to give back what no worker has read of; then its lease ends it.
const RETURN_TRIES: usize = 40;

/// What waits to be done. Bounded: by the permits, and by the streams there are.
#[derive(Debug)]
pub(super) struct Errands {
    waiting: Mutex<Waiting>,
    filled: Notify,
    permits: Arc<Semaphore>,
    /// Streams with slots that are open: where there are none, they cost nothing.
    open: AtomicUsize,
    is_closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Waiting {
    claims: Vec<NewTask>,
    fills: Vec<Arc<Stream>>,
    returns: Vec<Return>,
}

/// A new task for one stream.
#[derive(Debug)]
struct NewTask {
    stream: Arc<Stream>,
    task_id: TaskId,
    claim_id: Uuid,
    permit: OwnedSemaphorePermit,
}

/// Claims that a worker does not know of, and whose stream has ended.
#[derive(Debug)]
struct Return {
    worker_id: WorkerId,
    connection_id: ConnectionId,
    claims: Vec<(TaskId, i64)>,
}

impl Default for Errands {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            filled: Notify::new(),
            permits: Arc::new(Semaphore::new(CLAIMS_IN_FLIGHT)),
            open: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
        }
    }
}

impl Errands {
    fn put(&self, change: impl FnOnce(&mut Waiting)) {
        change(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        self.filled.notify_one();
    }

    fn take(&self) -> Waiting {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A stream begins.
    pub(super) fn opened(&self, stream: &Stream) {
        self.open.fetch_add(usize::from(stream.has_slots), Ordering::Relaxed);
    }

    /// A stream has ended.
    fn ended(&self, stream: &Stream) {
        self.open.fetch_sub(usize::from(stream.has_slots), Ordering::Relaxed);
    }

    /// The replica drains: nobody is given anything any more.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
    }

    fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Relaxed)
    }
}

impl Hub {
    /// Gives a new task to one of the streams that it concerns, to the one with the most free slots. False:
    /// none has one. Those that would have taken it find it in the backlog.
    pub(super) fn assign(&self, task: &Announcement) -> bool {
        if self.errands.is_closed() || self.errands.open.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let concerned = self.concerned(task);
        let with_slots = concerned.iter().filter(|stream| stream.has_slots);
        let mut able: Vec<_> =
            with_slots.filter_map(|stream| Some((stream.free_for(task)?, stream))).collect();
        let best = able.iter().map(|(free, _)| *free).max().unwrap_or_default();
        // Of several, any: `concerned` comes in no order.
        able.sort_by_key(|(free, _)| best - free);
        for (_, stream) in able.iter().take_while(|(free, _)| *free > 0) {
            let Ok(permit) = Arc::clone(&self.errands.permits).try_acquire_owned() else { break };
            if let Some(claim_id) = stream.reserve() {
                let (stream, task_id) = (Arc::clone(stream), task.push.task.id);
                let claim = NewTask { stream, task_id, claim_id, permit };
                self.errands.put(|waiting| waiting.claims.push(claim));
                return true;
            }
        }
        for (_, stream) in able {
            stream.expect_more();
            self.fill(stream);
        }
        false
    }

    /// Has free slots of a stream filled, and what its worker is to be told pushed.
    pub(super) fn fill(&self, stream: &Arc<Stream>) {
        if !self.errands.is_closed() && stream.begin_to_fill() {
            self.errands.put(|waiting| waiting.fills.push(Arc::clone(stream)));
        }
    }

    /// A stream has ended. Has claims given back that its worker cannot know of.
    pub(super) fn slots_ended(&self, stream: &Stream) {
        self.errands.ended(stream);
        self.give_back(stream);
    }

    /// Has claims given back that the worker of a stream that has ended cannot know of.
    fn give_back(&self, stream: &Stream) {
        let claims = stream.unread_claims();
        if !claims.is_empty() {
            let (worker_id, connection_id) = (stream.worker_id.clone(), stream.connection_id);
            let back = Return { worker_id, connection_id, claims };
            self.errands.put(|waiting| waiting.returns.push(back));
        }
    }
}

/// Does what waits. Cheap to clone.
#[derive(Clone)]
pub struct Assigner(Arc<Parts>);

struct Parts {
    store: Store,
    hub: Arc<Hub>,
    inbox: Arc<Inbox>,
    metrics: Arc<Metrics>,
    fills: Semaphore,
    /// Held by all that is in flight.
    at_work: Arc<RwLock<()>>,
}

impl Assigner {
    /// To be run as a task.
    #[must_use]
    pub fn new(store: Store, hub: Arc<Hub>, inbox: Arc<Inbox>, metrics: Arc<Metrics>) -> Self {
        let fills = Semaphore::new(FILLS_IN_FLIGHT);
        Self(Arc::new(Parts { store, hub, inbox, metrics, fills, at_work: Arc::default() }))
    }

    /// Claims and pushes, until shutdown.
    pub async fn run(self, shutdown: Shutdown) {
        while shutdown.until_stopping(self.0.hub.errands.filled.notified()).await.is_some() {
            self.set_out().await;
        }
    }

    /// Gives back what no worker has read of, for streams that are open still, too: the replica ends.
    pub async fn finish(&self) {
        self.0.hub.errands.close();
        for stream in self.0.hub.streams() {
            self.0.hub.unsubscribe(&stream);
        }
        loop {
            self.set_out().await;
            drop(self.0.at_work.write().await);
            let waiting = self.0.hub.errands.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.returns.is_empty() {
                return;
            }
        }
    }

    async fn set_out(&self) {
        let Waiting { claims, fills, returns } = self.0.hub.errands.take();
        for new in claims {
            let (this, at_work) = (self.clone(), Arc::clone(&self.0.at_work).read_owned().await);
            tokio::spawn(async move {
                let again = this.claim(&new).await;
                drop(at_work);
                if again {
                    this.offer_again(new.task_id).await;
                }
                drop(new.permit);
            });
        }
        for stream in fills {
            let (this, at_work) = (self.clone(), Arc::clone(&self.0.at_work).read_owned().await);
            tokio::spawn(async move {
                let filled = this.fill(&stream).await;
                drop(at_work);
                match filled {
                    Ok(Filled::Done) => {}
                    Ok(Filled::Stuck) => tokio::time::sleep(RETRY_AFTER).await,
                    Err(error) => {
                        report("could not claim for a worker, will try again", &error);
                        tokio::time::sleep(RETRY_AFTER).await;
                    }
                }
                stream.filled();
                this.0.hub.fill(&stream);
            });
        }
        for back in returns {
            let (this, at_work) = (self.clone(), Arc::clone(&self.0.at_work).read_owned().await);
            tokio::spawn(async move {
                this.return_claims(&back).await;
                drop(at_work);
            });
        }
    }

    /// Claims a new task for a stream. True: somebody may still be able to claim it.
    async fn claim(&self, new: &NewTask) -> bool {
        let NewTask { stream, task_id, claim_id, .. } = new;
        let (task_id, worker_id) = (*task_id, stream.worker_id.clone());
        let ask = ClaimAsk { task_id, worker_id, claim_id: Some(*claim_id) };
        let claim = self.0.store.task_claim(ask).await;
        if let Ok(Claim::Claimed(claimed)) = claim {
            self.0.metrics.claim("assigned");
            self.push(stream, *claim_id, &[claimed]);
            return false;
        }
        stream.give_up(*claim_id);
        self.0.metrics.claim("not_assigned");
        self.0.hub.fill(stream);
        match claim {
            Ok(Claim::NotRouted | Claim::UnknownWorker) => {
                self.0.hub.review_workers(&[stream.worker_id.clone()].into());
                true
            }
            Ok(_) => false,
            // Postgres is away, or the row is locked. If it was claimed all the same, a look finds it.
            Err(_) => true,
        }
    }

    async fn offer_again(&self, task: TaskId) {
        tokio::time::sleep(jittered(AGAIN_AFTER)).await;
        self.0.inbox.add_tasks([task]);
    }

    /// Pushes what is owed to a worker, and fills its free slots from the backlog.
    async fn fill(&self, stream: &Arc<Stream>) -> Result<Filled, StoreError> {
        let Ok(_turn) = self.0.fills.acquire().await else { return Ok(Filled::Done) };
        let Parts { store, hub, metrics, .. } = &*self.0;
        let owed = stream.owed();
        if !owed.is_empty() {
            let tasks = store.slots_tasks(&stream.worker_id, &owed).await?;
            stream.write_off(&owed, &tasks);
            stream.push_owed(&tasks);
            if stream.owed().first() == owed.first() {
                return Ok(Filled::Stuck);
            }
        }
        let Some(wanted) = stream.begin_to_claim() else { return Ok(Filled::Done) };
        let claim_id = wanted.claim_id;
        let count = i64::try_from(wanted.count).unwrap_or(i64::MAX);
        let room = i64::try_from(wanted.room_bytes).unwrap_or(i64::MAX);
        let claimed = store.slots_claim_next(&stream.worker_id, count, claim_id, room).await;
        let claimed = claimed.inspect_err(|_| stream.give_up(claim_id))?;
        if !claimed.is_empty() {
            metrics.claims("assigned", claimed.len());
            self.push(stream, claim_id, &claimed);
            return Ok(Filled::Done);
        }
        stream.give_up(claim_id);
        // What rivals have locked was passed over, and nobody tells when it no longer is.
        hub.count_backlog_read();
        let backlog = store.push_backlog(std::slice::from_ref(&stream.worker_id), 1).await?;
        stream.settle_backlog(&wanted);
        if backlog.iter().any(|tasks| !tasks.is_empty()) {
            let (pause, this, stream) = (stream.locked_pause(), self.clone(), Arc::clone(stream));
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                stream.expect_more();
                this.0.hub.fill(&stream);
            });
        }
        Ok(Filled::Done)
    }

    fn push(&self, stream: &Arc<Stream>, claim_id: Uuid, claimed: &[crate::store::Claimed]) {
        let is_open = stream.push_claimed(claim_id, claimed);
        // While it is subscribed, its end does that.
        if !is_open && !self.0.hub.has(stream) {
            self.0.hub.give_back(stream);
        }
    }

    /// Releases claims at no attempt's cost, unless the worker has a newer stream with slots: that one
    /// pushes all that the worker holds.
    async fn return_claims(&self, back: &Return) {
        let named = [(back.worker_id.clone(), back.connection_id)];
        let mut left = back.claims.clone();
        for _ in 0..RETURN_TRIES {
            match self.0.store.slots_elsewhere(&named).await {
                Ok(elsewhere) if !elsewhere.is_empty() => return,
                Ok(_) => left = self.release(&back.worker_id, left).await,
                Err(error) => report("could not give claims back, will try again", &error),
            }
            if left.is_empty() {
                return;
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    /// Those that could not be released.
    async fn release(
        &self,
        worker_id: &WorkerId,
        claims: Vec<(TaskId, i64)>,
    ) -> Vec<(TaskId, i64)> {
        let release = async |claim: (TaskId, i64)| {
            let (task_id, worker_id) = (claim.0, worker_id.clone());
            let fence = Fence { task_id, worker_id, claim_epoch: Some(claim.1) };
            let finish = self.0.store.task_finish(FinishAsk { fence, verb: Verb::Release }).await;
            finish.is_err().then_some(claim)
        };
        let left = futures_util::future::join_all(claims.into_iter().map(release)).await;
        left.into_iter().flatten().collect()
    }
}

/// What became of an attempt to fill slots.
enum Filled {
    Done,
    /// What was to be pushed could not be.
    Stuck,
}
