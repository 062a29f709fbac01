//! The promises of Taskwire, against real replicas (processes), a real Postgres and real bytes.
//!
//! Each test owns a database; the replicas that it starts share it. Nothing is mocked, and nothing
//! waits for a time to pass where it can wait for a condition. Ids such as S5 or C1 are those of
//! the wire protocol.

#![expect(unreachable_pub, reason = "modules of one test binary")]

mod support;

mod api;
mod bad_input;
mod claims;
mod hostile_requests;
mod injection;
mod limits;
mod raw_sockets;
mod streams;
mod workers;
