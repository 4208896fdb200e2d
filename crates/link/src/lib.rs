//! The way from one node to another: TCP and TLS 1.3 with both sides
//! authenticated, the hello, and how an accepted connection finds the shim it
//! is meant for.
//!
//! ```text
//! source agent ──TLS──▶ NODE.transship.internal ──────────▶ target agent
//! source shim ───TLS──▶ TICKET.NODE.transship.internal
//!                          │ the agent peeks at the name, reads nothing
//!                          └─ arrivals.sock, SCM_RIGHTS ──▶ target shim, which
//!                                                           does the handshake
//! ```
#![forbid(unsafe_code)]

mod channel;
pub mod in_memory;

pub use channel::{BoxRead, BoxWrite, Channel};
