//! The node agent: admits, routes, cancels and remembers migrations, and asks
//! the local daemon for the arriving container. It never sees a memory page.
//!
//! ```text
//!  transship ──▶ control ──▶ source ──TLS──▶ peer: listener ──▶ target
//!                  │           │                                  │
//!                  └── book ───┴── daemon (containerd), shim ─────┘
//! ```
#![forbid(unsafe_code)]

mod access;
pub mod authority;
pub mod book;
mod check;
pub mod config;
pub mod containerd;
mod control;
pub mod daemon;
mod doors;
pub mod failure;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzz;
mod host;
pub mod identity;
mod listener;
pub mod logging;
pub mod node;
mod offer;
pub mod plan;
mod preflight;
mod resolve;
pub mod serve;
pub mod shim;
mod source;
mod talk;
mod target;
pub mod tuning;

#[cfg(test)]
mod tests;
