//! From a notification to bytes on a stream. One way, for one replica as for ten:
//!
//! [`listener`] merges hints into the [`inbox`]; the [`router`] turns them into truth with one
//! query, makes the [`frames`] once and offers them to the streams of the [`hub`]; each stream's
//! [`window`] decides, and its [`mailbox`] holds what its socket has not taken yet.
//! [`sweep`] finds what no hint told, [`settle`] what has become of what was told, [`unread`] counts what
//! a worker may not have read, [`fanout`] offers tasks to few workers first, [`age`] and [`stuck`] end streams, [`presence`] keeps their rows. Besides streams there are
//! [`waiters`], calls that wait for a task to claim, and who follows one task: [`watch`].
//!
//! A worker with [`slots`] hears of nothing: what is for it is claimed and pushed by [`assign`], and [`held`]
//! compares what it holds with Postgres.
//!
//! No handler pushes to a stream: a task reaches the workers of its own replica by this path too.

pub mod age;
pub mod announcement;
pub mod assign;
mod attention;
mod doubts;
pub mod fanout;
pub mod frames;
pub mod held;
pub mod hub;
pub mod inbox;
mod index;
pub mod listener;
pub mod mailbox;
mod narrow;
pub mod presence;
pub mod router;
pub mod settle;
mod slot_stream;
pub mod slots;
pub mod stream;
pub mod stuck;
pub mod sweep;
pub mod unread;
pub mod waiters;
mod waiting;
pub mod watch;
pub mod window;
