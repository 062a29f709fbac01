//! What Taskwire is about, without I/O: ids, tasks, routing, limits.
//!
//! Absent on purpose: SQL, HTTP, tokio. A test (`tests/it/layers.rs`) keeps it that way.

pub mod asked;
pub mod fanout;
pub mod fence;
pub mod ids;
pub mod limits;
pub mod routing;
pub mod task;

pub use asked::Asked;
pub use fanout::Fanout;
pub use fence::Fence;
pub use ids::{ConnectionId, ReplicaId, TaskId, WorkerId};
pub use limits::Invalid;
pub use routing::{Routing, TaskRouting};
pub use task::{NewTask, Status, Task};
