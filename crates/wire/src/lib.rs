//! Frames: how messages and bulk bytes share one connection between nodes.
//!
//! ```text
//!  0        1              4                        8
//!  ┌────────┬──────────────┬────────────────────────┬─────────────
//!  │ kind   │ zero         │ length, little endian  │ payload …
//!  └────────┴──────────────┴────────────────────────┴─────────────
//!    1 = control (one protobuf message)    at most MAX_CONTROL
//!    2 = data    (bulk bytes, no message)  at most MAX_DATA
//! ```
//!
//! A run of data is any number of data frames closed by an empty one; which
//! run it is says the control message before it. Nothing here knows sockets
//! or TLS: any `AsyncRead` and `AsyncWrite` will do.
#![forbid(unsafe_code)]

mod error;
mod frame;
mod reader;
mod shape;
mod writer;

pub use error::WireError;
pub use frame::{Frame, MAX_CONTROL, MAX_DATA};
pub use reader::{Reader, decode};
pub use shape::MAX_FIELDS;
pub use writer::Writer;

#[cfg(test)]
mod tests;
