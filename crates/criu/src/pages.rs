//! Memory images of CRIU, completed from what was sent beside them.
//!
//! A dump with hidden memory ([`Hider`](crate::Hider)) leaves images in which
//! the processes have mappings and no pages. Before the restore each page
//! that was there at the freeze gets its place:
//!
//! * where CRIU restores lazily, with the fault server: nothing is written.
//!   CRIU registers the whole mapping and asks for no list, so a pagemap
//!   entry per run of pages would only be read and forgotten in the pause;
//! * elsewhere (copied pages of private files, locked memory, huge pages,
//!   the page a stack pointer is in) in the image: CRIU reads it from there.
//!
//! Shared objects that CRIU found empty
//! ([`Gate::empty`](crate::Gate::empty)) are given to it ([`give`]), filled.
//! Where that cannot be, all of their pages go into the image: CRIU fills them
//! before any process is there.
//!
//! What CRIU saved nevertheless stays and is restored from the image.
//!
//! The images come from another machine. They are read once, with a limit,
//! and become checked types here.

mod complete;
mod guards;
mod image;
mod layout;
mod network;
mod objects;

use std::path::PathBuf;

use thiserror::Error;
use transship_types::{PageRange, Space};

use crate::CriuError;

pub use complete::{Completed, CompletedShared, Contents, complete, complete_shared, eager};
pub use guards::{add_guards, guards};
pub use layout::{ProcessLayout, Vma, layout};
pub use network::shares_network;
pub use objects::{Given, Seals, give};

#[derive(Debug, Error)]
pub enum PagesError {
    #[error(transparent)]
    File(#[from] CriuError),
    #[error("{} is no such image as CRIU writes: {why}", path.display())]
    Image { path: PathBuf, why: &'static str },
    #[error("fetching {range} of {space}")]
    Fetch { space: Space, range: PageRange, source: std::io::Error },
    #[error("giving shared object {inode} to CRIU")]
    Give { inode: u64, source: std::io::Error },
}

#[cfg(test)]
mod tests;
