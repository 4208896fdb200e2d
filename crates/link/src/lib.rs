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
// Allowed in `sys` alone.
#![deny(unsafe_code)]

pub mod arrivals;
mod channel;
mod connect;
mod credentials;
mod error;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzz;
pub mod in_memory;
mod limits;
pub mod local;
mod route;
mod sys;
mod trust;

pub use channel::{BoxRead, BoxWrite, Channel};
pub use connect::{accept, connect_agent, connect_ticket, turn_away};
pub use credentials::{Credentials, Pem};
pub use error::{LinkError, renewal};
pub use route::{Route, route};
pub use trust::Trust;
