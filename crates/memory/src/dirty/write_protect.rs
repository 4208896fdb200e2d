//! Asynchronous write-protection (Linux 6.7): a page that we protected and
//! that is written loses its protection by itself, nobody waits, and one scan
//! of the page tables names those pages and protects them again.
//!
//! A userfaultfd of the process's own memory is what sets it up ([`inject`]).
//! Everything that happens to memory behind our back ends in mappings that are
//! not registered with it: new ones, moved ones, those of a forked child, all
//! of them after execve(2). The scan refuses those, and then everything in
//! them counts as changed. The same holds for any other trouble with a range.

use std::{io, time::Instant};

use transship_types::{PageRange, PageSet};

use super::{
    Cost, Pages, Watch,
    table::{Categories, Collector, Pagemap, changed, reverted, spans},
};
use crate::{
    inject,
    maps::{self, Mapping},
    spaces::Process,
    sys::uffd::{Mode, Userfaultfd, feature},
};

/// All that is asked of the kernel. No events: the process would wait for us
/// to read them.
const FEATURES: u64 = feature::WP_ASYNC | feature::WP_UNPOPULATED | feature::WP_HUGETLBFS_SHMEM;

/// Whether the kernel has all of it, tried on ourselves.
pub(super) fn available() -> Result<Categories, String> {
    if !inject::SUPPORTED {
        return Err("not available on this architecture".into());
    }
    let own = Userfaultfd::create().map_err(|error| format!("no userfaultfd ({error})"))?;
    own.api(FEATURES).map_err(|error| format!("no asynchronous write-protection ({error})"))?;
    Categories::known()
}

pub(super) struct WriteProtect {
    categories: Categories,
    uffd: Option<Userfaultfd>,
    /// Watched by a userfaultfd of the process's own: not ours to reset.
    foreign: PageSet,
    /// Every page of the process's own that has ever been protected, those of
    /// files aside: named by a round, and maybe gone since. With it the last
    /// scan need not name what has not changed, which is nearly everything.
    known: PageSet,
}

impl WriteProtect {
    pub fn new(categories: Categories) -> Self {
        Self { categories, uffd: None, foreign: PageSet::new(), known: PageSet::new() }
    }

    /// Names what was written in the mappings that are watched, and answers
    /// those that are not.
    fn rescan<'a>(
        &mut self,
        maps: &'a [Mapping],
        pagemap: &mut Pagemap,
        dirty: &mut Collector,
    ) -> Vec<&'a Mapping> {
        let mut watched = 0;
        let mut unwatched = Vec::new();
        for mapping in maps.iter().filter(|mapping| mapping.moves()) {
            let filter = self.categories.within(mapping.file).rearm();
            let ours = self.foreign.within(mapping.range).next().is_none()
                && pagemap.scan(mapping.range, &filter, |r| dirty.add(r.start, r.end)).is_ok();
            if ours {
                watched += 1;
            } else {
                // An error may follow on pages that were protected already
                // and not named. That is why all of them count as changed.
                unwatched.push(mapping);
            }
        }
        // Not even a stack: another program is running.
        if watched == 0 {
            self.uffd = None;
        }
        unwatched
    }

    fn attach(&mut self, process: &Process, cost: &mut Cost) {
        self.foreign = PageSet::new();
        self.known = PageSet::new();
        let taken = match inject::userfaultfd_of(process) {
            Ok(taken) => taken,
            Err(refused) => {
                cost.unwatched = Some(refused.to_string());
                return;
            }
        };
        cost.stopped = Some(taken.stopped);
        let uffd = Userfaultfd::from(taken.uffd);
        match uffd.api(FEATURES) {
            Ok(_) => self.uffd = Some(uffd),
            Err(error) => cost.unwatched = Some(format!("its userfaultfd was refused: {error}")),
        }
    }

    /// Names everything in a mapping, and watches it from now on if possible.
    fn adopt(
        &mut self,
        mapping: &Mapping,
        pagemap: &mut Pagemap,
        dirty: &mut Collector,
    ) -> io::Result<()> {
        let range = mapping.range;
        let own = self.categories.within(mapping.file);
        if !mapping.writable {
            // A program's code: nothing changed in it, and to watch it would
            // make its page faults slower.
            let mut any = false;
            pagemap.scan(range, &own.all(), |_| any = true)?;
            if !any {
                return Ok(());
            }
        }
        if self.register(range)
            && pagemap.scan(range, &own.arm(), |r| dirty.add(r.start, r.end)).is_ok()
        {
            return Ok(());
        }
        pagemap.scan(range, &own.all(), |r| dirty.add(r.start, r.end))
    }

    fn register(&mut self, range: PageRange) -> bool {
        let Some(uffd) = &self.uffd else { return false };
        match uffd.register(range, Mode::WriteProtect) {
            Ok(()) => {
                self.foreign.remove(range);
                true
            }
            Err(error) => {
                if error.raw_os_error() == Some(libc::EBUSY) {
                    self.foreign.insert(range);
                }
                // Gone, or of a kind that cannot be watched (droppable).
                false
            }
        }
    }

    fn scan(&mut self, process: &Process, cost: &mut Cost) -> io::Result<PageSet> {
        let begin = Instant::now();
        let maps = maps::of(process.pid)?;
        let Some(mut pagemap) = Pagemap::open(process.pid)? else { return Ok(PageSet::new()) };
        let mut dirty = Collector::default();
        let unwatched = if self.uffd.is_some() {
            self.rescan(&maps, &mut pagemap, &mut dirty)
        } else {
            maps.iter().filter(|mapping| mapping.moves()).collect()
        };
        cost.scanning = begin.elapsed();
        if self.uffd.is_none() && !unwatched.is_empty() {
            self.attach(process, cost);
        }
        for mapping in unwatched {
            self.adopt(mapping, &mut pagemap, &mut dirty)?;
        }
        cost.arming = begin.elapsed() - cost.scanning;
        let dirty = dirty.finish();
        // Nothing is taken out again here: maps that are read while they
        // change may lack a mapping that is there and watched.
        self.known.extend(&dirty);
        Ok(dirty)
    }
}

impl Watch for WriteProtect {
    fn round(&mut self, process: &Process, cost: &mut Cost) -> io::Result<PageSet> {
        self.scan(process, cost).inspect_err(|_| {
            // Pages may have been protected and not named: nothing that is
            // known holds any more.
            self.uffd = None;
            self.known = PageSet::new();
        })
    }

    fn look(&self, process: &Process) -> io::Result<Pages> {
        let maps = maps::of(process.pid)?;
        let Some(mut pagemap) = Pagemap::open(process.pid)? else { return Ok(Pages::default()) };
        let (mut dirty, mut present, mut holes) = <(Collector, Collector, Collector)>::default();
        for (span, file) in spans(&maps) {
            let own = self.categories.within(file);
            if file {
                pagemap.scan(span, &own.look(), |region| {
                    present.add(region.start, region.end);
                    if self.uffd.is_none() || changed(region) || reverted(region) {
                        dirty.add(region.start, region.end);
                    }
                })?;
                continue;
            }
            pagemap.scan(span, &own.news(), |region| {
                if !own.holds(region) {
                    holes.add(region.start, region.end);
                } else if self.uffd.is_none() || changed(region) {
                    dirty.add(region.start, region.end);
                    present.add(region.start, region.end);
                } else {
                    // In swap, as it was.
                    present.add(region.start, region.end);
                }
            })?;
        }
        let (mut dirty, present) = (dirty.finish(), present.finish());
        let mut all = self.known.intersection(&anonymous(&maps));
        all.subtract(&holes.finish());
        all.extend(&present);
        for range in self.foreign.iter() {
            all.within(range).for_each(|part| dirty.insert(part));
        }
        Ok(Pages { dirty, present: all })
    }
}

/// The mappings that move and show no file.
fn anonymous(maps: &[Mapping]) -> PageSet {
    maps.iter().filter(|mapping| mapping.moves() && !mapping.file).map(|m| m.range).collect()
}
