//! Words the whole project shares: names that were checked once, where our
//! sockets lie, and the reasons for a refusal. No I/O, no async.
#![forbid(unsafe_code)]

mod name;
mod page;
pub mod paths;
pub mod quantity;
mod refusal;
pub mod tuning;

pub use name::{ContainerKey, DOMAIN, Epoch, InvalidName, MigrationId, NodeName, Ticket};
pub use page::{ADDRESS_LIMIT, InvalidRange, PAGE, PageRange, PageSet, Space};
pub use refusal::{Code, Refusal};

/// Version of the protocol between nodes (docs/protocol.md). A node refuses a
/// peer that does not speak it.
pub const PROTOCOL: u32 = 2;

/// Annotation of the OCI spec that makes our shim's Start an arrival.
pub const TICKET_ANNOTATION: &str = "dev.transship.ticket";

/// Annotation that decides what a checkpoint without options does, for
/// clients that cannot say it: `stop` or `continue` (the default).
pub const CHECKPOINT_ANNOTATION: &str = "dev.transship.checkpoint";

/// The name of our runtime, and the second name it is installed under.
pub const RUNTIME: &str = "io.containerd.transship.v2";
pub const RUNTIME_AS_RUNC: &str = "io.containerd.runc.v2-transship";
