//! One address space that is being filled.
//!
//! Pages are placed under the shared side of `quiet`; the descriptor is read,
//! and what it tells is applied, under the exclusive side. So no page can be
//! on its way while we learn that its place was unmapped, emptied, moved or
//! forked: the kernel refuses to place any (EAGAIN) from the moment that
//! happens until we have read of it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use nix::errno::Errno;
use transship_types::{PAGE, PageRange, PageSet, Space};

use super::{lock, remaining::Remaining};
use crate::{
    MemoryError,
    store::{Piece, Store},
    sys::uffd::{Event, Userfaultfd},
};

/// A process of the source and its forks here: they wait for the same pages.
#[derive(Debug)]
pub(super) struct Family {
    space: Space,
    state: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    members: HashMap<u64, Remaining>,
    /// In the store, and waited for by no member any more.
    unneeded: PageSet,
}

impl Waiting {
    fn drop_homes(&mut self, homes: Vec<PageRange>) {
        for home in homes {
            let mut unneeded: PageSet = [home].into_iter().collect();
            for member in self.members.values() {
                let needed: Vec<_> = member.homes().within(home).collect();
                needed.into_iter().for_each(|range| unneeded.remove(range));
            }
            self.unneeded.extend(&unneeded);
        }
    }
}

#[derive(Debug)]
pub(super) struct Task {
    pub id: u64,
    /// Restored by CRIU, and not a fork of one that was.
    pub primary: bool,
    pub uffd: Userfaultfd,
    family: Arc<Family>,
    quiet: RwLock<()>,
    /// Where the background fill goes on.
    cursor: AtomicU64,
    /// A page whose place was not ours to fill, and since when.
    unmapped: Mutex<Option<(u64, Instant)>>,
}

/// How placing a range ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placing {
    Done,
    /// Something happened that we have to read of first.
    Again,
    /// This page lies nowhere that CRIU left to us, or does no longer.
    Unmapped(u64),
    /// The process is gone.
    Gone,
    /// This page (by its home) has not come yet.
    Missing(u64),
}

impl Task {
    pub fn restored(id: u64, space: Space, pages: &PageSet, uffd: Userfaultfd) -> Self {
        let members = HashMap::from([(id, Remaining::new(pages))]);
        let state = Mutex::new(Waiting { members, unneeded: PageSet::new() });
        Self::new(id, true, uffd, Arc::new(Family { space, state }))
    }

    fn new(id: u64, primary: bool, uffd: Userfaultfd, family: Arc<Family>) -> Self {
        let (quiet, cursor, unmapped) = (RwLock::new(()), AtomicU64::new(0), Mutex::new(None));
        Self { id, primary, uffd, family, quiet, cursor, unmapped }
    }

    pub fn space(&self) -> Space {
        self.family.space
    }

    pub fn is_filled(&self) -> bool {
        lock(&self.family.state).members.get(&self.id).is_none_or(Remaining::is_empty)
    }

    /// Reads what the descriptor has to tell and applies it. `adopt` is given
    /// every fork before anybody can believe that nothing is waited for.
    pub fn read(
        &self,
        mut adopt: impl FnMut(Userfaultfd, &dyn Fn(u64, Userfaultfd) -> Task),
    ) -> Result<Vec<PageRange>, MemoryError> {
        let _exclusive = self.quiet.write().unwrap_or_else(PoisonError::into_inner);
        let mut events = Vec::new();
        self.uffd
            .read(&mut events)
            .map_err(|source| MemoryError::System { what: "reading a userfaultfd", source })?;
        let mut faults = Vec::new();
        let mut waiting = lock(&self.family.state);
        for event in events {
            let mine = waiting.members.entry(self.id).or_default();
            let homes = match event {
                Event::Fault { page } => {
                    faults.extend(PageRange::of_pages(page, 1));
                    Vec::new()
                }
                Event::Fork(_) if mine.is_empty() => Vec::new(),
                Event::Fork(uffd) => {
                    let copy = Mutex::new(Some(mine.clone()));
                    let members = Mutex::new(&mut waiting.members);
                    adopt(uffd, &|id, uffd| {
                        let copy = lock(&copy).take().unwrap_or_default();
                        lock(&members).insert(id, copy);
                        Task::new(id, false, uffd, Arc::clone(&self.family))
                    });
                    Vec::new()
                }
                Event::Remap { from, to, bytes } => {
                    let pages = bytes / PAGE;
                    match (PageRange::of_pages(from, pages), PageRange::of_pages(to, pages)) {
                        (Ok(from), Ok(to)) => mine.shift(from, to),
                        _ => Vec::new(),
                    }
                }
                Event::Remove { start, end } | Event::Unmap { start, end } => {
                    PageRange::new(start, end)
                        .map_or_else(|_| Vec::new(), |range| mine.remove(range))
                }
            };
            waiting.drop_homes(homes);
        }
        Ok(faults)
    }

    /// Places what the range waits for. A page that someone is waiting at
    /// (`fault`) becomes zero if it is not among it.
    pub fn place(
        &self,
        store: &Store,
        range: PageRange,
        fault: bool,
    ) -> Result<(Placing, u64), MemoryError> {
        let _shared = self.quiet.read().unwrap_or_else(PoisonError::into_inner);
        let parts = {
            let waiting = lock(&self.family.state);
            waiting.members.get(&self.id).map_or_else(Vec::new, |mine| mine.within(range))
        };
        let mut ended = Ok(Placing::Done);
        let mut done = Vec::new();
        let mut copied = 0;
        for (here, home) in parts {
            store.pieces(self.family.space, home, |part, piece| {
                let start = here.start() + (part.start() - home.start());
                let pages = match piece {
                    Piece::Missing => {
                        ended = Ok(Placing::Missing(part.start()));
                        0
                    }
                    // Nobody has to place what is there when nobody places it.
                    Piece::Zero => part.pages(),
                    Piece::Bytes(source) => {
                        let (pages, how) = self.fill(start, part.pages(), source);
                        copied += pages;
                        ended = how;
                        pages
                    }
                };
                done.extend(PageRange::of_pages(start, pages));
                matches!(ended, Ok(Placing::Done))
            })?;
            if !matches!(ended, Ok(Placing::Done)) {
                break;
            }
        }
        if fault && copied == 0 && matches!(ended, Ok(Placing::Done)) {
            ended = self.zero(range);
        }
        let mut waiting = lock(&self.family.state);
        for range in done {
            let homes = waiting.members.entry(self.id).or_default().remove(range);
            waiting.drop_homes(homes);
        }
        Ok((ended?, copied))
    }

    /// The process is gone, or this range of it: nothing there is waited for.
    pub fn forget(&self, range: Option<PageRange>) {
        let _exclusive = self.quiet.write().unwrap_or_else(PoisonError::into_inner);
        let mut waiting = lock(&self.family.state);
        let homes = match range {
            Some(range) => waiting.members.entry(self.id).or_default().remove(range),
            None => waiting.members.remove(&self.id).unwrap_or_default().homes().iter().collect(),
        };
        waiting.drop_homes(homes);
    }

    /// Gives back to the store what no member of the family waits for.
    pub fn tidy(&self, store: &Store, at_least: u64) -> Result<(), MemoryError> {
        let unneeded = {
            let mut waiting = lock(&self.family.state);
            if waiting.unneeded.pages() < at_least {
                return Ok(());
            }
            std::mem::take(&mut waiting.unneeded)
        };
        unneeded.iter().try_for_each(|range| store.forget(self.family.space, range))
    }

    /// The next stretch in the order of addresses, over and over.
    pub fn next(&self, pages: u64) -> Option<PageRange> {
        let waiting = lock(&self.family.state);
        let mine = waiting.members.get(&self.id)?;
        let (next, _) = mine.from(self.cursor.load(Relaxed)).or_else(|| mine.from(0))?.split(pages);
        self.cursor.store(next.end(), Relaxed);
        Some(next)
    }

    /// Since when this page, or another before it, has had no place.
    pub fn unmapped_since(&self, page: u64) -> Instant {
        let waiting = lock(&self.family.state);
        let waited_for = |page: u64| {
            let page = PageRange::of_pages(page, 1).ok();
            let mine = waiting.members.get(&self.id);
            mine.zip(page).is_some_and(|(mine, page)| !mine.within(page).is_empty())
        };
        let mut unmapped = lock(&self.unmapped);
        let (_, since) = unmapped
            .take_if(|(page, _)| waited_for(*page))
            .unwrap_or_else(|| (page, Instant::now()));
        unmapped.insert((page, since)).1
    }

    fn fill(
        &self,
        start: u64,
        pages: u64,
        source: *const u8,
    ) -> (u64, Result<Placing, MemoryError>) {
        let (mut filled, mut step) = (0, pages);
        while filled < pages {
            let Ok(range) = PageRange::of_pages(start + filled * PAGE, step.min(pages - filled))
            else {
                return (filled, Ok(Placing::Unmapped(start)));
            };
            let copy = self.uffd.copy(range, source.wrapping_add((filled * PAGE) as usize));
            filled += copy.bytes / PAGE;
            match copy.stopped {
                None => {}
                Some(Errno::EAGAIN) if copy.bytes > 0 => {}
                // Out of memory is the container's limit, as it is in a fault
                // of its own: some is freed, or somebody killed.
                Some(Errno::EAGAIN | Errno::ENOMEM) => return (filled, Ok(Placing::Again)),
                Some(Errno::EEXIST) => {
                    self.wake(range.split(1).0);
                    filled += 1;
                }
                // A run must lie in one mapping; a page always does.
                Some(Errno::ENOENT) if range.pages() > 1 => step = range.pages() / 2,
                Some(Errno::ENOENT) => return (filled, Ok(Placing::Unmapped(range.start()))),
                Some(Errno::ESRCH | Errno::ENOSPC) => return (filled, Ok(Placing::Gone)),
                Some(errno) => return (filled, Err(system("placing pages", errno))),
            }
        }
        (filled, Ok(Placing::Done))
    }

    fn zero(&self, page: PageRange) -> Result<Placing, MemoryError> {
        match self.uffd.zero(page).stopped {
            None => Ok(Placing::Done),
            Some(Errno::EAGAIN | Errno::ENOMEM) => Ok(Placing::Again),
            Some(Errno::EEXIST | Errno::ENOENT) => {
                self.wake(page);
                Ok(Placing::Done)
            }
            Some(Errno::ESRCH | Errno::ENOSPC) => Ok(Placing::Gone),
            Some(errno) => Err(system("placing a zero page", errno)),
        }
    }

    pub fn wake(&self, page: PageRange) {
        // Fails only where nobody can be waiting any more.
        let _ = self.uffd.wake(page);
    }
}

fn system(what: &'static str, errno: Errno) -> MemoryError {
    MemoryError::System { what, source: errno.into() }
}
