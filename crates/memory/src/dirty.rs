//! How writes are noticed: one small trait, three ways.

mod none;
mod soft_dirty;
mod table;
mod write_protect;

use std::{io, time::Duration};

use transship_types::PageSet;

use crate::{Backend, MemoryError, spaces::Process};

/// The pages of one process.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Pages {
    /// Those that changed since the last round, and maybe some that did not.
    pub dirty: PageSet,
    /// Those that exist and belong to this process alone, and maybe some that
    /// turned into the page of zeroes after they had been named.
    pub present: PageSet,
}

/// What watching one process has cost in one round.
#[derive(Debug, Default)]
pub(crate) struct Cost {
    /// The process stood still for so long.
    pub stopped: Option<Duration>,
    /// Spent on memory that was not watched before.
    pub arming: Duration,
    pub scanning: Duration,
    /// Why its memory is not watched: all of it counts as changed.
    pub unwatched: Option<String>,
}

/// Watches the memory of one process, which has the pid for its lifetime but
/// not one address space: it may execute another program.
pub(crate) trait Watch: Send {
    /// What has changed since the call before; everything at the first.
    fn round(&mut self, process: &Process, cost: &mut Cost) -> io::Result<PageSet>;
    /// The same, and what there is, without a trace. Exact only while the
    /// process stands still.
    fn look(&self, process: &Process) -> io::Result<Pages>;
}

/// A backend that this kernel has.
#[derive(Debug)]
pub(crate) enum Chosen {
    WriteProtect(table::Categories),
    SoftDirty(table::Entries),
    None(table::Table),
}

impl Chosen {
    /// The best of those that are wanted; asks the kernel, touches nobody.
    pub fn choose(wanted: &[Backend]) -> Result<Self, MemoryError> {
        let mut reasons = Vec::new();
        for backend in wanted {
            let found = match backend {
                Backend::WriteProtect => write_protect::available().map(Self::WriteProtect),
                Backend::SoftDirty => soft_dirty::available().map(Self::SoftDirty),
                Backend::None => table::Table::best().map(Self::None),
            };
            match found {
                Ok(chosen) => return Ok(chosen),
                Err(reason) => reasons.push(format!("{}: {reason}", backend.as_str())),
            }
        }
        Err(MemoryError::Invalid(format!("memory cannot be watched ({})", reasons.join("; "))))
    }

    pub fn backend(&self) -> Backend {
        match self {
            Self::WriteProtect(_) => Backend::WriteProtect,
            Self::SoftDirty(_) => Backend::SoftDirty,
            Self::None(_) => Backend::None,
        }
    }

    pub fn watch(&self) -> Box<dyn Watch> {
        match self {
            Self::WriteProtect(categories) => {
                Box::new(write_protect::WriteProtect::new(*categories))
            }
            Self::SoftDirty(entries) => Box::new(soft_dirty::SoftDirty::new(*entries)),
            Self::None(table) => Box::new(none::Unwatched::new(*table)),
        }
    }
}
