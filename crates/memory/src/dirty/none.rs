//! Not at all: memory is read once, while the container stands still.

use std::io;

use transship_types::PageSet;

use super::{Cost, Pages, Watch, table::Table};
use crate::spaces::Process;

pub(super) struct Unwatched {
    table: Table,
}

impl Unwatched {
    pub fn new(table: Table) -> Self {
        Self { table }
    }
}

impl Watch for Unwatched {
    /// Nothing: what would be sent now would have to be sent again.
    fn round(&mut self, _: &Process, _: &mut Cost) -> io::Result<PageSet> {
        Ok(PageSet::new())
    }

    fn look(&self, process: &Process) -> io::Result<Pages> {
        let present = self.table.present(process.pid)?;
        Ok(Pages { dirty: present.clone(), present })
    }
}
