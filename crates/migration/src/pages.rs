//! Pages on their way: batches of them over several connections at a time.
//!
//! ```text
//! Dirty ─▶ one queue ─┬─▶ lane 0: read, find zeros, compress ──TLS──▶ lane 0: check, ─┬─▶ store
//!                     └─▶ lane 1: the same, whoever is free  ──TLS──▶ expand, put     ─┘
//! ```
//!
//! Every lane, on either side, is a thread of its own with its own runtime
//! and its own connection: reading memory and encrypting it are work for a
//! processor, and none of it may keep the shim from answering. At most one
//! batch a lane is in memory. Lanes carry nothing but batches; that a round is
//! complete is said on the first connection, by their number.

mod batch;
mod limit;
mod receive;
mod send;
#[cfg(test)]
mod tests;

use std::{future::Future, io, thread};

use tokio::runtime;

use crate::MigrationError;

#[cfg(feature = "fuzz")]
pub(crate) use batch::Checked;
pub(crate) use batch::{numbers, ranges, sort, space, space_name};
pub use limit::RateLimit;
pub(crate) use receive::put;
pub use receive::{PageReceiver, PageSink};
pub use send::{PageSender, RoundTotals};

/// Runs `work` on a thread with a runtime of its own.
fn on_a_thread<F: Future<Output = ()>>(
    name: String,
    work: impl FnOnce() -> F + Send + 'static,
) -> Result<(), MigrationError> {
    let failed = |what: &'static str| {
        move |error: io::Error| MigrationError::runtime(what, error.to_string())
    };
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed("preparing a lane"))?;
    // Not joined: it ends by itself once its owner is gone, and nobody may
    // block for that.
    thread::Builder::new()
        .name(name)
        .spawn(move || runtime.block_on(work()))
        .map_err(failed("starting a lane"))?;
    Ok(())
}
