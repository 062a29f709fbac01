//! The promises of Taskwire, against real replicas (processes), a real Postgres and real bytes.
//!
//! Each test owns a database; the replicas that it starts share it. Nothing is mocked, and nothing
//! waits for a time to pass where it can wait for a condition. Ids such as S5 or C1 are those of
//! the wire protocol.

#![expect(unreachable_pub, reason = "modules of one test binary")]
#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a test that panics has failed")]

mod support;

mod ages;
mod api;
mod bad_input;
mod bench;
mod campaign;
mod claim_next;
mod claims;
mod complete_many;
mod embedded;
mod events;
mod examples;
mod fanout;
mod group_commit;
mod hand_written;
mod hostile_requests;
mod injection;
mod layers;
mod leases;
mod limits;
mod model;
mod operators;
mod plans;
mod postgres_away;
mod proxies;
mod push;
mod raw_sockets;
mod readme;
mod routing;
mod schema;
mod slots;
mod sockets;
mod stalls;
mod startup;
mod storms;
mod streams;
mod stuck;
mod unread;
mod workers;
