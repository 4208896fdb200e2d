//! The tmpfs mounts that only a container has: `/dev`, `/dev/shm`, what its
//! spec asks for, the empty ones that mask a directory of `/proc`.
//!
//! CRIU starts a program for each of them, on both nodes and inside the pause.
//! So it is told that they are somebody else's: it neither saves nor makes
//! them, and binds what it finds prepared in their place.
//!
//! ```text
//! source                                    target
//! plan ─▶ hold ── frozen, dumped ─▶ send ~~▶ make ─▶ bound by CRIU
//! ```
//!
//! A mount that is not plainly one of these stays with CRIU, which does it
//! rightly and slowly.

mod mount;
mod options;
mod plan;

pub use mount::{Held, make};
pub use options::{Options, UnknownOption};
pub use plan::{Left, Plan, Tmpfs, Why, plan};
