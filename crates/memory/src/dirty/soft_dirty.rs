//! The soft-dirty bit (CONFIG_MEM_SOFT_DIRTY, not on arm64): set by the kernel
//! when a page is written, read from /proc/PID/pagemap, cleared for all pages
//! by a word to /proc/PID/clear_refs.
//!
//! Reading and clearing are two steps, and a write between them would be lost.
//! So the process stands still for both: some 100 ms for each GiB and round.

use std::{fs, io, path::PathBuf, time::Instant};

use transship_types::PageSet;

use super::{Cost, Pages, Watch, table::Entries};
use crate::{maps, spaces::Process, stop};

/// Clears the soft-dirty bits and nothing else.
const CLEAR: &str = "4";

/// Whether this kernel marks what is written, tried on ourselves.
pub(super) fn available() -> Result<Entries, String> {
    match Entries::soft_dirty_known() {
        Ok(true) => Entries::known().map_err(|error| error.to_string()),
        Ok(false) => Err("the kernel keeps no soft-dirty bit".into()),
        Err(error) => Err(format!("our own pagemap cannot be read ({error})")),
    }
}

pub(super) struct SoftDirty {
    entries: Entries,
    /// /proc, but for tests.
    proc: PathBuf,
    /// The bits have been cleared once, and mean something.
    begun: bool,
}

impl SoftDirty {
    pub fn new(entries: Entries) -> Self {
        Self { entries, proc: "/proc".into(), begun: false }
    }

    fn file(&self, pid: i32, name: &str) -> PathBuf {
        self.proc.join(pid.to_string()).join(name)
    }

    fn pages(&self, pid: i32) -> io::Result<Pages> {
        let maps = maps::read(&self.file(pid, "maps"))?;
        self.entries.read(&self.file(pid, "pagemap"), &maps)
    }

    fn clear(&self, pid: i32) -> io::Result<()> {
        match fs::write(self.file(pid, "clear_refs"), CLEAR) {
            Err(error) if maps::gone(&error) => Ok(()),
            done => done,
        }
    }
}

impl Watch for SoftDirty {
    fn round(&mut self, process: &Process, cost: &mut Cost) -> io::Result<PageSet> {
        let begin = Instant::now();
        let pid = process.pid;
        if !self.begun {
            // Cleared first, so that whatever is written from here on is
            // named next time; all there is is named now.
            self.clear(pid)?;
            self.begun = true;
            let all = self.pages(pid)?.present;
            cost.arming = begin.elapsed();
            return Ok(all);
        }
        let both = || {
            let pages = self.pages(pid)?;
            self.clear(pid)?;
            Ok(pages.dirty)
        };
        let dirty = match stop::all_threads(pid, both) {
            Ok((dirty, stopped)) => {
                cost.stopped = Some(stopped);
                dirty
            }
            // Nothing is cleared, so nothing is lost.
            Err(refused) => {
                cost.unwatched = Some(refused.to_string());
                Ok(self.pages(pid)?.present)
            }
        };
        cost.scanning = begin.elapsed();
        dirty
    }

    fn look(&self, process: &Process) -> io::Result<Pages> {
        let mut pages = self.pages(process.pid)?;
        if !self.begun {
            pages.dirty = pages.present.clone();
        }
        Ok(pages)
    }
}
