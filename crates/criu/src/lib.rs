//! The CRIU gate: the shim between an OCI runtime and CRIU.
//!
//! runc and crun pass few of CRIU's options and start CRIU inside the pause.
//! We patch neither. The runtime runs with a `PATH` in which `criu` is our own
//! [`stub`]; it hands the runtime's RPC socket to the shim's [`Gate`] and then
//! becomes the real CRIU, with another socket in its place:
//!
//! ```text
//! runtime ──fork, exec "criu swrk N"──▶ stub ──same pid──▶ CRIU
//!    │                                   │ SCM_RIGHTS        │
//!    └────── request, answers ────▶ Conversation ────────────┘
//!                                  hold · amend · observe
//! ```
//!
//! What CRIU would spend the pause on is kept from it: private memory
//! ([`Hider`], and [`pages`] to complete the images), the network namespace
//! ([`Gate::network`]), and tar for every tmpfs (`tar`, which is this program).
//!
//! A [`Conversation`] is one DUMP or RESTORE seen from the middle. What we do
//! not understand passes byte by byte ([`fields`]).

mod amend;
mod conversation;
mod error;
pub mod features;
pub mod fields;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzz;
mod gate;
mod hide;
pub mod images;
pub mod log;
mod packet;
pub mod pages;
mod remembered;
pub mod stub;
mod sys;
mod tar;

#[cfg(any(test, feature = "fake"))]
pub mod fake;
#[cfg(test)]
mod tests;

pub use amend::{Amendments, Inherited, MAX_INHERITED};
pub use conversation::{Conversation, Kind, Notified, Outcome};
pub use error::{CriuError, Side};
pub use gate::{Gate, LIBRARY};
pub use hide::{Hidden, Hider, lists_mappings};
pub use remembered::Remembered;
