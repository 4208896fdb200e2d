//! The memory of a container outside CRIU: what has changed, what it holds,
//! where it waits on the target, and how it gets under the restored processes.
//!
//! Knows processes and pages, and nothing of migrations, links or images.
// Allowed in `sys` alone.
#![deny(unsafe_code)]

pub mod codec;
mod container;
mod dirty;
mod error;
mod faults;
mod inject;
mod maps;
mod obstacles;
mod read;
pub mod room;
mod shared;
mod spaces;
mod stop;
mod store;
#[allow(unsafe_code)]
mod sys;
mod tracker;

pub use container::ContainerMemory;
pub use error::MemoryError;
pub use faults::{FaultServer, Options as FaultOptions, Served, Serving, Source};
pub use obstacles::obstacles;
pub use shared::SharedObjects;
pub use store::Store;
pub use tracker::{Pids, Statistics, Tracker, Want};

use std::time::Duration;

use transship_types::{PageRange, PageSet, Space};

/// How writes are noticed; the names appear in reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Asynchronous write-protection by userfaultfd, read by PAGEMAP_SCAN
    /// (Linux 6.7 and later).
    WriteProtect,
    /// The soft-dirty bit (CONFIG_MEM_SOFT_DIRTY).
    SoftDirty,
    /// Not at all: everything is read once, while the container is frozen.
    None,
}

impl Backend {
    pub fn as_str(self) -> &'static str {
        match self {
            Backend::WriteProtect => "write-protect",
            Backend::SoftDirty => "soft-dirty",
            Backend::None => "none",
        }
    }
}

/// What may have changed since the round before, by space.
#[derive(Debug, Clone, Default)]
pub struct Dirty {
    pub spaces: Vec<(Space, PageSet)>,
}

impl Dirty {
    pub fn pages(&self) -> u64 {
        self.spaces.iter().map(|(_, pages)| pages.pages()).sum()
    }
}

/// What is true while every task stands still.
#[derive(Debug, Clone, Default)]
pub struct Last {
    /// Changed since the last round.
    pub dirty: Dirty,
    /// The pages that exist. Only these may be on the target, whatever was
    /// sent before: the rest reads as zero or belongs to a file.
    pub present: Vec<(Space, PageSet)>,
    pub scan: Duration,
}

/// The memory of a running container, as its source sees it.
///
/// Every call blocks, some for as long as the kernel walks page tables: they
/// belong on a thread of their own. Calls may come from several threads; those
/// to `read` run side by side.
pub trait Memory: Send + Sync + 'static {
    fn backend(&self) -> Backend;
    /// What changed since the call before, everything at the first; starts to
    /// watch what is new.
    fn round(&self) -> Result<Dirty, MemoryError>;
    /// How many pages the next `round` would name, changing nothing.
    fn peek(&self) -> Result<u64, MemoryError>;
    /// The same as `round` for the last time; every task stands still.
    fn last(&self) -> Result<Last, MemoryError>;
    /// Copies the ranges, one after the other, into `into`, which is as long
    /// as all of them. Answers those that could not be read, because they are
    /// gone; their bytes are zero.
    fn read(
        &self,
        space: Space,
        ranges: &[PageRange],
        into: &mut [u8],
    ) -> Result<Vec<PageRange>, MemoryError>;
    /// The name of the memfd that a shared object is, or is restored as; none
    /// for everything else.
    fn memfd(&self, _space: Space) -> Option<Vec<u8>> {
        None
    }
    /// Stops watching: no process is any slower afterwards. Also when dropped.
    fn disarm(&self);
}
