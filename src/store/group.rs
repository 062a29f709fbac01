//! Group commit: requests that arrive while a statement is in flight share the next one.
//!
//! Postgres takes a cluster-wide lock from a transaction's first NOTIFY to its commit, and each
//! commit costs a flush of the log. One statement for many requests pays both once. Nobody is made
//! to wait for company: an idle server's single request goes out at once.
//!
//! Each group runs in tasks of its own, so a client that hangs up cannot cancel a statement half
//! way, and the answer is sent after the commit only.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::StoreError;

/// Operations that share one statement, at most.
const BATCH_OPS_MAX: usize = 256;
/// Bytes that share one statement, about.
const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Operations of one kind that may wait; more are told to come back.
const QUEUE_OPS_MAX: usize = 16_384;
/// KiB of operations of one kind that may wait.
const QUEUE_KIB_MAX: usize = 128 * 1024;
/// Statements of one kind in flight. Two: while one commits, the next one is on its way.
const IN_FLIGHT: usize = 2;

/// One kind of statement that many requests can share.
pub(crate) trait Batch: Send + Sync + 'static {
    /// What a request asks for. It has been checked: one bad one must not fail its neighbours.
    type Op: Send + Sync + 'static;
    /// What it is answered.
    type Out: Send + 'static;

    /// About how many bytes the operation takes on its way to Postgres.
    fn weight_bytes(_op: &Self::Op) -> usize {
        256
    }

    /// Runs the one statement. Answers stand in the order of the operations.
    fn run(
        &self,
        ops: &[Self::Op],
    ) -> impl Future<Output = Result<Vec<Self::Out>, StoreError>> + Send;
}

struct Waiting<B: Batch> {
    op: B::Op,
    answer: oneshot::Sender<Result<B::Out, StoreError>>,
    /// Gives the operation's share of the queue back when it is answered.
    room: OwnedSemaphorePermit,
}

/// The queue in front of one kind of statement.
pub(crate) struct Group<B: Batch> {
    queue: mpsc::Sender<Waiting<B>>,
    room_kib: Arc<Semaphore>,
}

impl<B: Batch> Group<B> {
    pub(crate) fn start(batch: B) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE_OPS_MAX);
        let lane = Arc::new(Lane {
            batch,
            waiting: Mutex::new(waiting),
        });
        for _ in 0..IN_FLIGHT {
            tokio::spawn(Arc::clone(&lane).run());
        }
        Self {
            queue,
            room_kib: Arc::new(Semaphore::new(QUEUE_KIB_MAX)),
        }
    }

    /// Runs one operation, in company if there is any, and answers after its commit.
    pub(crate) async fn submit(&self, op: B::Op) -> Result<B::Out, StoreError> {
        let kib = u32::try_from(B::weight_bytes(&op) / 1024 + 1).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room_kib)
            .try_acquire_many_owned(kib)
            .map_err(|_| StoreError::Busy)?;
        let (answer, answered) = oneshot::channel();
        self.queue
            .try_send(Waiting { op, answer, room })
            .map_err(|_| StoreError::Busy)?;
        answered.await.unwrap_or(Err(StoreError::Busy))
    }
}

struct Lane<B: Batch> {
    batch: B,
    waiting: Mutex<mpsc::Receiver<Waiting<B>>>,
}

impl<B: Batch> Lane<B> {
    async fn run(self: Arc<Self>) {
        while let Some(batch) = self.next().await {
            let (ops, answers): (Vec<_>, Vec<_>) = batch
                .into_iter()
                .map(|w| (w.op, (w.answer, w.room)))
                .unzip();
            match self.batch.run(&ops).await {
                Ok(outs) => {
                    for ((answer, _room), out) in answers.into_iter().zip(outs) {
                        // A caller that hung up does not want its answer.
                        let _ = answer.send(Ok(out));
                    }
                }
                Err(error @ StoreError::Unavailable(_)) => {
                    for (answer, _room) in answers {
                        let _ = answer.send(Err(error.clone()));
                    }
                    self.refuse_waiting(&error);
                }
                // One of them is bad: find out which.
                Err(_) if ops.len() > 1 => {
                    for (op, (answer, _room)) in ops.iter().zip(answers) {
                        let _ = answer.send(self.run_one(op).await);
                    }
                }
                Err(error) => {
                    for (answer, _room) in answers {
                        let _ = answer.send(Err(error.clone()));
                    }
                }
            }
        }
    }

    async fn run_one(&self, op: &B::Op) -> Result<B::Out, StoreError> {
        let mut outs = self.batch.run(std::slice::from_ref(op)).await?;
        outs.pop().ok_or(StoreError::Busy)
    }

    /// What is waiting now, up to the caps; waits for the first. `None` once the store is gone.
    async fn next(&self) -> Option<Vec<Waiting<B>>> {
        let mut waiting = self.waiting.lock().await;
        let first = waiting.recv().await?;
        let mut bytes = B::weight_bytes(&first.op);
        let mut batch = vec![first];
        while batch.len() < BATCH_OPS_MAX && bytes < BATCH_BYTES_MAX {
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
            let _ = late.answer.send(Err(error.clone()));
        }
    }
}
