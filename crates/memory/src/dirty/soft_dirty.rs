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

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt, process::Command};

    use transship_types::{PAGE, PageRange, PageSet};

    use super::*;

    const ZEROES: u64 = 77;
    const SOFT_DIRTY: u64 = 1 << 55;
    const FILE: u64 = 1 << 61;
    const SWAPPED: u64 = 1 << 62;
    const PRESENT: u64 = 1 << 63;

    fn pages(numbers: &[u64]) -> PageSet {
        numbers.iter().map(|&page| PageRange::of_pages(page * PAGE, 1).unwrap()).collect()
    }

    /// A real process, of which only the threads are real: its files are ours.
    struct Fake {
        child: std::process::Child,
        proc: tempfile::TempDir,
        process: Process,
        watch: SoftDirty,
    }

    impl Fake {
        fn new() -> Self {
            let proc = tempfile::tempdir().unwrap();
            let child = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
            let pid = child.id() as i32;
            let process = Process::open(pid).unwrap().unwrap();
            fs::create_dir(proc.path().join(pid.to_string())).unwrap();
            let mut watch = SoftDirty::new(Entries::new(ZEROES));
            watch.proc = proc.path().into();
            let fake = Self { child, proc, process, watch };
            fs::write(
                fake.file("maps"),
                "10000-14000 rw-p 00000000 00:00 0 \n\
                 14000-16000 rw-s 00000000 00:01 9 /shared\n\
                 16000-18000 r--p 00000000 00:00 0 [vvar]\n\
                 18000-19000 ---p 00000000 00:00 0 \n",
            )
            .unwrap();
            fake
        }

        fn file(&self, name: &str) -> PathBuf {
            self.proc.path().join(self.process.pid.to_string()).join(name)
        }

        fn set(&self, entries: &[(u64, u64)]) {
            let pagemap = fs::File::create(self.file("pagemap")).unwrap();
            pagemap.set_len(0x20 * 8).unwrap();
            for (page, entry) in entries {
                pagemap.write_all_at(&entry.to_ne_bytes(), page * 8).unwrap();
            }
        }

        fn cleared(&self) -> bool {
            fs::read_to_string(self.file("clear_refs")).is_ok_and(|written| written == CLEAR)
        }

        fn round(&mut self) -> PageSet {
            let _ = fs::remove_file(self.file("clear_refs"));
            self.watch.round(&self.process, &mut Cost::default()).unwrap()
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    #[test]
    fn an_entry_tells_whose_a_page_is() {
        let entries = Entries::new(ZEROES);
        for (entry, own) in [
            (0, None),
            (SOFT_DIRTY, None),
            (PRESENT | 5, Some(false)),
            (PRESENT | SOFT_DIRTY | 5, Some(true)),
            (PRESENT | FILE | SOFT_DIRTY | 5, None),
            (PRESENT | SOFT_DIRTY | ZEROES, None),
            // Not a place in memory, but one in swap.
            (SWAPPED | SOFT_DIRTY | ZEROES, Some(true)),
            (SWAPPED | ZEROES, Some(false)),
        ] {
            assert_eq!(entries.decode(entry), own, "{entry:#x}");
        }
        assert_eq!(Entries::new(0).decode(PRESENT), Some(false), "a frame that is kept from us");
    }

    #[test]
    fn all_at_first_and_then_what_is_marked() {
        let mut fake = Fake::new();
        fake.set(&[
            (0x10, PRESENT | 1),
            (0x12, SWAPPED | 1),
            (0x13, PRESENT | ZEROES),
            (0x14, PRESENT | SOFT_DIRTY | 3),
            (0x16, PRESENT | SOFT_DIRTY | 4),
            (0x18, PRESENT | 5),
        ]);
        let all = pages(&[0x10, 0x12, 0x18]);
        let look = fake.watch.look(&fake.process).unwrap();
        assert_eq!((&look.dirty, &look.present), (&all, &all));
        assert!(!fake.cleared());
        assert_eq!(fake.round(), all);
        assert!(fake.cleared());
        assert_eq!(fake.round(), pages(&[]));

        fake.set(&[(0x10, PRESENT | 1), (0x11, PRESENT | SOFT_DIRTY | 6)]);
        let look = fake.watch.look(&fake.process).unwrap();
        assert_eq!((look.dirty, look.present), (pages(&[0x11]), pages(&[0x10, 0x11])));
        assert_eq!(fake.round(), pages(&[0x11]));
        assert!(fake.cleared());
    }

    #[test]
    fn the_process_stands_still_while_it_is_read_and_cleared() {
        let fake = Fake::new();
        let pid = fake.process.pid;
        let state = || stop::state(pid, pid);
        let (inside, stopped) = stop::all_threads(pid, state).unwrap();
        assert_eq!(inside, Some(b't'));
        assert!(stopped > std::time::Duration::ZERO);
        assert_ne!(state(), Some(b't'));
    }
}
