//! Moves a container's writable layer from one node to another in passes.
//!
//! The first pass sends everything, each later one what changed since the
//! pass before, and the last one what changed until the container froze. So
//! the pause pays for the last few writes only, whatever the layer weighs.
//!
//! ```text
//! source                                             target
//! upper directory ── which entries ──┐
//!                                    ├─▶ records ──▶ checked, then applied through
//! merged mount ───── what they are ──┘   (format)    the merged mount of its own
//!                                                    overlay
//! ```
//!
//! Which entries belong to the layer is read from the upper directory; what
//! they look like is read through the merged mount, and applied through the
//! merged mount of the target. Overlayfs alone then knows about whiteouts,
//! opaque and redirected directories and metadata-only copies, in the way its
//! own kernel wants them, and no `trusted.overlay.*` ever travels.
//!
//! The same stream carries a tmpfs that only the container has ([`tmpfs`]).
//!
//! All of it is blocking I/O. The format is documented in docs/protocol.md,
//! section "Writable layer".
#![deny(unsafe_code)]

mod apply;
mod beneath;
mod entry;
mod error;
mod format;
mod index;
mod mounts;
mod send;
#[allow(unsafe_code)]
mod sys;
pub mod tmpfs;
mod tree;
mod walk;

pub use apply::{Receiver, sync};
pub use error::{Problem, RootfsError};
pub use index::Index;
pub use mounts::{Kind, Layer};
pub use send::{send, send_frozen};

/// What one pass carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Entries created, replaced, updated or removed.
    pub entries: u64,
    /// Bytes of file content; holes, names and metadata are not counted.
    pub bytes: u64,
}
