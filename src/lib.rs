//! Taskwire: a task server that pushes work to workers over Server-Sent Events and keeps all of its
//! truth in Postgres.
//!
//! ```text
//!   producer                        worker ◀──────────────── SSE ───────────────┐
//!      │ POST /v1/tasks               │ POST …/claim  …/heartbeat  …/complete   │
//!      ▼                              ▼                                         │
//!   http/      parse, ask, answer                                     http/stream.rs
//!      │                              │                                         ▲ mailbox (bounded)
//!      ▼                              ▼                                         │
//!   domain/    pure: tasks, routing predicate, limits                push/ router + hub + frames
//!      │                              │                                         ▲
//!      ▼                              ▼                                         │
//!   store/     the only SQL; group commit ──▶  P o s t g r e s  ──NOTIFY──▶ push/listener.rs
//!                                                  ▲                 (one LISTEN per replica)
//!   operators: psql ───────────────────────────────┘    maintenance/ (every replica, no leader)
//! ```
//!
//! Invariants, often about what is deliberately absent:
//!
//! 1. The row is the truth. A notification is a hint: lost, repeated, late or forged, it changes
//!    latency, never correctness. Whatever it says is read again from the table.
//! 2. Whether a worker hears of a task and whether it may claim it is one predicate:
//!    [`domain::routing`] in memory, `task_is_for` in SQL.
//! 3. A claim is one statement; each later write carries the fence (task, owner, claim epoch) in its
//!    `where`, and zero rows is an answer, not a success.
//!    The reaper, too, locks a claim's row before it looks whether its worker lives.
//! 4. No handler pushes to a stream, not even for a worker on the same replica.
//! 5. Times that two processes compare are made and compared by Postgres; processes send durations.
//! 6. Every maintenance duty is safe on all replicas at once; there is no leader.
//! 7. All queues are bounded, all waits have deadlines, and a replica holds nothing that a restart
//!    may not lose.
//!
//! To read on: [`domain`], [`store`], [`push`], [`http`], [`maintenance`], [`server`].

pub mod bench;
pub mod cli;
pub mod config;
pub mod domain;
pub mod embedded;
pub mod http;
pub mod maintenance;
pub mod metrics;
pub mod push;
pub mod server;
pub mod shutdown;
pub mod stalls;
pub mod store;
pub mod telemetry;
