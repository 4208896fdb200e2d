//! Nodes on one machine, for the integration tests, the demo and people.
//!
//! A [`Node`] is what a second computer would be to containerd, runc and CRIU:
//! its own network, mounts, processes, host name, IPC and cgroups, a tmpfs on
//! `/run`, and a containerd that finds our shim. It is torn down when it is
//! dropped, and also when the process that made it dies in whatever way: a
//! supervisor outside the node waits for the end of a pipe.
//!
//! ```text
//! test process ──pipe──▶ transship-node supervise   waits for EOF; removes cgroups and folder
//!                          └─ transship-node enclose   joins the cgroups, unshares
//!                               └─ transship-node init   pid 1 of the node: mounts, reaps
//!                                    ├─ containerd, its shims, containers …
//! ```
#![forbid(unsafe_code)]

pub mod agents;
pub mod api;
pub mod bench;
pub mod cgroups;
pub mod daemon;
pub mod events;
pub mod images;
pub mod inside;
pub mod leftovers;
mod locate;
mod network;
mod node;
mod rlimits;
pub mod stdio;
mod wait;
pub mod workload;
mod world;

pub use leftovers::Things;
pub use locate::{bin_dir, target_dir};
pub use network::Switch;
pub use node::{Done, Node, Spawned};
pub use wait::{PATIENCE, eventually, until};
pub use world::{World, refusal};
