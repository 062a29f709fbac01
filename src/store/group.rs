//! Group commit: requests that arrive while a statement is in flight share the next one.
//!
//! Postgres takes a cluster-wide lock from a transaction's first NOTIFY to its commit, and each
//! commit costs a flush of the log. One statement for many requests pays both once, and what Postgres
//! does for each statement, some 0.3 ms, too. A request that finds no statement of its kind in flight goes
//! out at once. One that does waits for company, until that statement has ended or there is enough of it, and for
//! a millisecond or two at most.
//!
//! Each group runs in tasks of its own, so a client that hangs up cannot cancel a statement half
//! way, and the answer is sent after the commit only.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::{Mutex, Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::StoreError;

/// Operations that share one statement, at most.
const BATCH_OPS_MAX: usize = 256;
/// Bytes that share one statement, about.
const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Operations of one kind that may wait; more are told to come back.
const QUEUE_OPS_MAX: usize = 16_384;
/// KiB of operations of one kind that may wait.
const QUEUE_KIB_MAX: usize = 128 * 1024;
/// How long a batch may take: a little longer than Postgres' own limit for a statement.
const BATCH_DEADLINE: Duration = Duration::from_secs(12);
/// Members of a batch that failed as a whole which are tried singly at the same time.
const SINGLES_IN_FLIGHT: usize = 4;
/// Statements of one kind in flight. Two: while a long one runs, the next one is on its way.
const IN_FLIGHT: usize = 2;
/// How long a request waits for company while a statement of its kind is in flight. (The runtime's clock ticks
/// each millisecond, so it may be twice that.)
const COMPANY_WAIT: Duration = Duration::from_millis(1);
/// Operations that are company enough.
const COMPANY_OPS: usize = 64;

/// One kind of statement that many requests can share.
pub(crate) trait Batch: Send + Sync + 'static {
    /// What a request asks for. It has been checked: one bad one must not fail its neighbours.
    type Op: Send + Sync + 'static;
    /// What it is answered.
    type Out: Send + 'static;

    /// Operations that share one statement, at most.
    const OPS_MAX: usize = BATCH_OPS_MAX;

    /// About how many bytes the operation takes on its way to Postgres.
    fn weight_bytes(_op: &Self::Op) -> usize {
        256
    }

    /// Runs the one statement. Answers stand in the order of the operations. An error of the whole
    /// means that no operation took effect, or that nobody can know: what failed after the
    /// statement's commit is the error of the operations that it concerns.
    fn run(
        &self,
        ops: &[Self::Op],
    ) -> impl Future<Output = Result<Vec<Result<Self::Out, StoreError>>, StoreError>> + Send;
}

/// Who waits for an answer.
struct Caller<Out> {
    answer: oneshot::Sender<Result<Out, StoreError>>,
    /// Gives the operation's share of the queue back when it is answered.
    _room: OwnedSemaphorePermit,
}

impl<Out> Caller<Out> {
    fn answer(self, out: Result<Out, StoreError>) {
        // A caller that hung up does not want its answer.
        let _ = self.answer.send(out);
    }
}

struct Waiting<B: Batch> {
    op: B::Op,
    caller: Caller<B::Out>,
}

/// The queue in front of one kind of statement.
pub(crate) struct Group<B: Batch> {
    queue: mpsc::Sender<Waiting<B>>,
    room_kib: Arc<Semaphore>,
    changed: Arc<Notify>,
}

impl<B: Batch> Group<B> {
    pub(crate) fn start(batch: B) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE_OPS_MAX);
        let changed = Arc::new(Notify::new());
        let lane = Lane {
            batch,
            waiting: Mutex::new(waiting),
            in_flight: AtomicUsize::new(0),
            changed: Arc::clone(&changed),
        };
        let lane = Arc::new(lane);
        for _ in 0..IN_FLIGHT {
            tokio::spawn(Arc::clone(&lane).keep_running());
        }
        Self { queue, room_kib: Arc::new(Semaphore::new(QUEUE_KIB_MAX)), changed }
    }

    /// Runs one operation, in company if there is any, and answers after its commit.
    pub(crate) async fn submit(&self, op: B::Op) -> Result<B::Out, StoreError> {
        let kib = u32::try_from(B::weight_bytes(&op) / 1024 + 1).unwrap_or(u32::MAX);
        let room =
            Arc::clone(&self.room_kib).try_acquire_many_owned(kib).map_err(|_| StoreError::Busy)?;
        let (answer, answered) = oneshot::channel();
        let caller = Caller { answer, _room: room };
        self.queue.try_send(Waiting { op, caller }).map_err(|_| StoreError::Busy)?;
        if self.queue.max_capacity() - self.queue.capacity() >= COMPANY_OPS {
            self.changed.notify_one();
        }
        answered.await.unwrap_or(Err(StoreError::Busy))
    }
}

/// A statement in flight, until it is dropped.
struct InFlight<'l>(&'l AtomicUsize, &'l Notify);

impl<'l> InFlight<'l> {
    fn new<B: Batch>(lane: &'l Lane<B>) -> Self {
        lane.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(&lane.in_flight, &lane.changed)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
        self.1.notify_one();
    }
}

struct Lane<B: Batch> {
    batch: B,
    waiting: Mutex<mpsc::Receiver<Waiting<B>>>,
    in_flight: AtomicUsize,
    /// A statement has ended, or there is company enough.
    changed: Arc<Notify>,
}

impl<B: Batch> Lane<B> {
    /// A panic would be a fault of ours, and ends one batch, not the lane.
    async fn keep_running(self: Arc<Self>) {
        while tokio::spawn(Arc::clone(&self).run()).await.is_err() {
            tracing::error!("a batch panicked; its requests are answered 503");
        }
    }

    async fn run(self: Arc<Self>) {
        while let Some(batch) = self.next().await {
            let (ops, callers): (Vec<_>, Vec<_>) =
                batch.into_iter().map(|waiting| (waiting.op, waiting.caller)).unzip();
            match self.attempt(&ops).await {
                Ok(outs) => {
                    for (caller, out) in callers.into_iter().zip(outs) {
                        caller.answer(out);
                    }
                }
                Err(error) if !error.had_no_effect() => {
                    for caller in callers {
                        caller.answer(Err(error.clone()));
                    }
                    if matches!(error, StoreError::Unavailable(_)) {
                        self.refuse_waiting(&error);
                    }
                }
                // One of them is bad, or meets a locked row. To find out which must not hold up
                // those who come after. (One that was alone is tried once more: a deadlock passes.)
                Err(_) => {
                    let members = ops.into_iter().zip(callers);
                    tokio::spawn(Arc::clone(&self).run_singly(members.collect()));
                }
            }
        }
    }

    async fn attempt(&self, ops: &[B::Op]) -> Result<Vec<Result<B::Out, StoreError>>, StoreError> {
        let _in_flight = InFlight::new(self);
        tokio::time::timeout(BATCH_DEADLINE, self.batch.run(ops))
            .await
            .unwrap_or_else(|_| Err(StoreError::timed_out()))
    }

    /// Waits until there is enough company in the queue, or no statement is in flight, or the time is up.
    async fn wait_for_company(&self, waiting: &mpsc::Receiver<Waiting<B>>) {
        let enough = async {
            while self.in_flight.load(Ordering::Relaxed) > 0 && waiting.len() < COMPANY_OPS {
                self.changed.notified().await;
            }
        };
        // The time being up is as good.
        let _ = tokio::time::timeout(COMPANY_WAIT, enough).await;
    }

    async fn run_singly(self: Arc<Self>, members: Vec<(B::Op, Caller<B::Out>)>) {
        let singly = async |(op, caller): (B::Op, Caller<B::Out>)| {
            let outs = self.attempt(std::slice::from_ref(&op)).await;
            caller.answer(outs.and_then(|mut outs| outs.pop().unwrap_or(Err(StoreError::Busy))));
        };
        futures_util::stream::iter(members).for_each_concurrent(SINGLES_IN_FLIGHT, singly).await;
    }

    /// What is waiting now, up to the caps; waits for the first. `None` once the store is gone.
    async fn next(&self) -> Option<Vec<Waiting<B>>> {
        let mut waiting = self.waiting.lock().await;
        let first = waiting.recv().await?;
        self.wait_for_company(&waiting).await;
        let mut bytes = B::weight_bytes(&first.op);
        let mut batch = vec![first];
        while batch.len() < B::OPS_MAX && bytes < BATCH_BYTES_MAX {
            let Ok(next) = waiting.try_recv() else { break };
            bytes += B::weight_bytes(&next.op);
            batch.push(next);
        }
        Some(batch)
    }

    /// Everyone who waited while Postgres was found to be away learns so now, rather than one
    /// connection attempt after another.
    fn refuse_waiting(&self, error: &StoreError) {
        let Ok(mut waiting) = self.waiting.try_lock() else {
            return;
        };
        while let Ok(late) = waiting.try_recv() {
            late.caller.answer(Err(error.clone()));
        }
    }
}

#[cfg(test)]
#[path = "group_tests.rs"]
mod tests;
