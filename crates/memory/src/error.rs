use std::io;

use thiserror::Error;
use transship_types::Space;

/// What went wrong with a container's memory, and with whose.
#[derive(Debug, Error)]
pub enum MemoryError {
    #[error("{what} of process {pid} failed")]
    Process { what: &'static str, pid: i32, source: io::Error },
    #[error("{what} failed")]
    System { what: &'static str, source: io::Error },
    /// A page that must be here is not.
    #[error("page {address:#x} of {space} never arrived")]
    Missing { space: Space, address: u64 },
    /// A peer or a kernel said what cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The limit that preflight agreed on would be passed.
    #[error("its pages need more than the {limit_bytes} bytes that were set aside")]
    Full { limit_bytes: u64 },
    /// Pages of zeros take no room, but where they are does.
    #[error("its pages lie in more than {limit} stretches")]
    Scattered { limit: usize },
}
