//! What the tables, the replicas and the workers know: one state of the model, in bytes.

use super::guard::Promise;

pub const WORKERS: usize = 3;
pub const REPLICAS: usize = 2;
pub const TASKS: usize = 2;
/// Instead of a worker or a replica.
pub const NOBODY: u8 = u8::MAX;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub tasks: [Task; TASKS],
    pub workers: [Worker; WORKERS],
    pub replicas: [Replica; REPLICAS],
    /// What may still go wrong.
    pub left: Budget,
    /// The promise that the last step broke, where the state alone does not show it.
    pub broken: Option<Promise>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Status {
    Absent,
    /// Acknowledged and not committed; only without `Guard::AnswerAfterCommit`.
    Uncommitted,
    Pending,
    Running,
    Completed,
    Failed,
    Cancelled,
}

/// A row of `tasks`, its heartbeat, and two counts that no server keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(clippy::struct_excessive_bools, reason = "facts that are independent of each other")]
pub struct Task {
    pub status: Status,
    /// While uncommitted: the replica.
    pub owner: u8,
    pub epoch: u8,
    pub attempt: u8,
    pub cancel: bool,
    /// Its owner's stream was told of the cancellation.
    pub cancel_told: bool,
    /// The `claim_id` is that of the ask which its owner remembers.
    pub asked: bool,
    /// Which of its owner's processes claimed it.
    pub process: u8,
    /// The lease in the row is over.
    pub lapsed: bool,
    /// The row's lease is over, but that of the last heartbeat is not.
    pub beat: bool,
    pub reap: Reap,
    pub claims: u8,
    pub releases: u8,
}

/// A reaper at a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reap {
    No,
    /// It has the row's lock, and will look for signs of life now.
    Locked(u8),
    /// It looked before it has the lock; only without `Guard::ReaperLooksAfterLocking`.
    Looked {
        by: u8,
        alive: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Worker {
    /// Grows when it crashes and starts again under its old name.
    pub process: u8,
    pub stream: Stream,
    /// The backlog is to be read (again).
    pub refill: bool,
    pub presence: Option<Presence>,
    /// The replica that is to clean up after this worker's connection before the present one.
    pub closing: u8,
    pub tells: [Tell; TASKS],
    pub holds: [Hold; TASKS],
    /// The epoch of a claim that a former process, cut off and not dead, still believes in.
    pub zombies: [u8; TASKS],
    /// A claim that is still on its way although the worker gave up waiting for its answer.
    pub late: [Option<Late>; TASKS],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    Closed,
    /// Backlog read, not subscribed; only without `Guard::SubscribeBeforeBacklog`.
    Opening {
        at: u8,
        backlog: u8,
    },
    Open {
        at: u8,
    },
}

impl Stream {
    pub fn at(self) -> Option<u8> {
        match self {
            Self::Closed => None,
            Self::Opening { at, .. } | Self::Open { at } => Some(at),
        }
    }
}

/// A row of `streams`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Presence {
    pub at: u8,
    /// It is that of the connection which is open, not of one that broke.
    pub is_current: bool,
    pub process: u8,
}

/// What a stream's window says of a task that can be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tell {
    Unknown,
    /// The worker was told, and is told again from time to time.
    Outstanding,
    /// The worker acted on it, and is not told again.
    Settled,
}

/// What a worker believes to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hold {
    Nothing,
    /// It claims, knows no answer, and will ask again; the epoch is the announced one.
    Asking(u8),
    /// Its repeat was recognised, the answer is to be read; only without
    /// `Guard::RepeatReadsOwnClaim`.
    Repeating(u8),
    Claim(u8),
    /// Its heartbeat's fence was checked and nothing written; only without
    /// `Guard::HeartbeatHoldsRow`.
    Beating(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Late {
    /// The epoch that was announced to whoever sent it.
    pub announced: u8,
    pub process: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(clippy::struct_excessive_bools, reason = "facts that are independent of each other")]
pub struct Replica {
    pub is_alive: bool,
    /// Postgres has seen it live of late. Nobody is, right after an outage.
    pub is_seen: bool,
    /// Alive, but the others gave it up.
    pub is_buried: bool,
    pub is_listening: bool,
    /// Tasks whose notification is on its way.
    pub hints: u8,
    /// Tasks whose cancellation's notification is on its way.
    pub cancel_hints: u8,
    /// Tasks that the next sweep has to find. It finds announced ones too, but with no other effect
    /// than their hint has, so that only those whose hint was lost are noted.
    pub unswept: u8,
}

/// How many tasks may still come, and how often each fault may still happen: what makes the space finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    pub inserts: u8,
    pub cancels: u8,
    pub lost_hints: u8,
    pub repeated_hints: u8,
    pub lost_listeners: u8,
    pub broken_streams: u8,
    pub crashes: u8,
    pub dead_replicas: u8,
    pub silences: u8,
    pub outages: u8,
    /// Leases that lapse: how often time passes.
    pub lapses: u8,
    pub lost_answers: u8,
    pub late_claims: u8,
    /// Completes in the words of the older server, which name no epoch.
    pub older_calls: u8,
    pub releases: u8,
}

impl State {
    pub fn new(left: Budget) -> Self {
        let task = Task {
            status: Status::Absent,
            owner: NOBODY,
            epoch: 0,
            attempt: 0,
            cancel: false,
            cancel_told: false,
            asked: false,
            process: 0,
            lapsed: false,
            beat: false,
            reap: Reap::No,
            claims: 0,
            releases: 0,
        };
        let worker = Worker {
            process: 0,
            stream: Stream::Closed,
            refill: false,
            presence: None,
            closing: NOBODY,
            tells: [Tell::Unknown; TASKS],
            holds: [Hold::Nothing; TASKS],
            zombies: [0; TASKS],
            late: [None; TASKS],
        };
        let replica = Replica {
            is_alive: true,
            is_seen: true,
            is_buried: false,
            is_listening: true,
            hints: 0,
            cancel_hints: 0,
            unswept: 0,
        };
        Self {
            tasks: [task; TASKS],
            workers: [worker; WORKERS],
            replicas: [replica; REPLICAS],
            left,
            broken: None,
        }
    }

    pub fn task(&self, t: u8) -> &Task {
        &self.tasks[usize::from(t)]
    }

    pub fn task_mut(&mut self, t: u8) -> &mut Task {
        &mut self.tasks[usize::from(t)]
    }

    pub fn worker(&self, w: u8) -> &Worker {
        &self.workers[usize::from(w)]
    }

    pub fn worker_mut(&mut self, w: u8) -> &mut Worker {
        &mut self.workers[usize::from(w)]
    }

    pub fn replica(&self, r: u8) -> &Replica {
        &self.replicas[usize::from(r)]
    }

    pub fn replica_mut(&mut self, r: u8) -> &mut Replica {
        &mut self.replicas[usize::from(r)]
    }

    /// The state's like in which workers, replicas and tasks, which all are alike, stand in order:
    /// what only differs in their names is checked once.
    pub fn folded(mut self) -> Self {
        if self.replica_key(1) < self.replica_key(0) {
            self.swap_replicas();
        }
        if self.tasks[1] < self.tasks[0] {
            self.swap_tasks();
        }
        for (a, b) in [(0, 1), (1, 2), (0, 1)] {
            if self.worker_key(b) < self.worker_key(a) {
                self.swap_workers(a, b);
            }
        }
        self
    }

    fn worker_key(&self, w: u8) -> (&Worker, [bool; TASKS]) {
        let owns = self.tasks.map(|task| task.status >= Status::Running && task.owner == w);
        (self.worker(w), owns)
    }

    fn replica_key(&self, r: u8) -> (&Replica, usize, usize, usize) {
        let count =
            |at: fn(&Worker) -> u8| self.workers.iter().filter(|worker| at(worker) == r).count();
        (
            self.replica(r),
            count(|worker| worker.stream.at().unwrap_or(NOBODY)),
            count(|worker| worker.presence.map_or(NOBODY, |presence| presence.at)),
            count(|worker| worker.closing),
        )
    }

    fn swap_tasks(&mut self) {
        let other = |bits: &mut u8| *bits = (*bits & 1) << 1 | *bits >> 1;
        self.tasks.swap(0, 1);
        for worker in &mut self.workers {
            worker.tells.swap(0, 1);
            worker.holds.swap(0, 1);
            worker.zombies.swap(0, 1);
            worker.late.swap(0, 1);
            if let Stream::Opening { backlog, .. } = &mut worker.stream {
                other(backlog);
            }
        }
        for replica in &mut self.replicas {
            other(&mut replica.hints);
            other(&mut replica.cancel_hints);
            other(&mut replica.unswept);
        }
    }

    fn swap_workers(&mut self, a: u8, b: u8) {
        self.workers.swap(usize::from(a), usize::from(b));
        for task in self.tasks.iter_mut().filter(|task| task.status >= Status::Running) {
            if task.owner == a {
                task.owner = b;
            } else if task.owner == b {
                task.owner = a;
            }
        }
    }

    fn swap_replicas(&mut self) {
        let other = |at: &mut u8| {
            if *at != NOBODY {
                *at = 1 - *at;
            }
        };
        self.replicas.swap(0, 1);
        for worker in &mut self.workers {
            other(&mut worker.closing);
            if let Stream::Opening { at, .. } | Stream::Open { at } = &mut worker.stream {
                other(at);
            }
            if let Some(presence) = &mut worker.presence {
                other(&mut presence.at);
            }
        }
        for task in &mut self.tasks {
            if let Reap::Locked(by) | Reap::Looked { by, .. } = &mut task.reap {
                other(by);
            }
            if task.status == Status::Uncommitted {
                other(&mut task.owner);
            }
        }
    }
}
