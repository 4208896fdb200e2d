//! Where pages wait on the target until they are placed.
//!
//! One arena for all, so that a container of many small processes does not
//! take a huge page for each; an ordered index for each space. Pages that are
//! here already are overwritten where they lie. A chunk of the arena goes
//! back to the kernel once its last page is forgotten.

mod grain;
mod index;
mod slots;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use transship_types::{PAGE, PageRange, PageSet, Space};

use crate::{
    MemoryError,
    sys::arena::{Arena, CHUNK, thread_time},
};
use grain::{Grain, Grains};
use index::{Index, Place};
use slots::{Run, Slots};

/// What the arena may have beyond the limit: pages on their way in that turn
/// out to be here already.
const SLACK_CHUNKS: usize = 32;

/// The most addresses a store asks for; a limit beyond is none.
const MOST_BYTES: u64 = 16 << 40;

/// Stretches of the index beyond those that the limit on bytes leads to. The
/// kernel's page of zeros is in a process for nothing, so stretches of it may
/// be more than the memory of the container says. At some 80 bytes each they
/// take 80 MiB.
const SPARE_STRETCHES: usize = 1 << 20;

type Arrived = Arc<dyn Fn(Space, &[PageRange]) + Send + Sync>;

/// The pages of a container that arrives. Every call may come from any thread.
pub struct Store {
    limit_bytes: u64,
    /// The index's own limit. A page of zeros takes no slot, so the limit on
    /// bytes is none for what it costs to remember where it is.
    limit_stretches: usize,
    /// In the index of all spaces.
    stretches: AtomicUsize,
    /// Made with the first page.
    arena: Mutex<Option<Arc<Arena>>>,
    slots: Mutex<Slots>,
    grains: Mutex<Grains>,
    spaces: Mutex<BTreeMap<Space, Arc<Kept>>>,
    arrived: Mutex<Option<Arrived>>,
}

#[derive(Default)]
struct Kept {
    /// Held shared while bytes are copied in or out of slots, exclusively
    /// while slots are given up.
    moving: RwLock<()>,
    index: Mutex<Index>,
    /// Once it is known which pages there are: those that still have to come.
    missing: Mutex<Option<PageSet>>,
}

/// What is known of a stretch of pages.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Piece {
    /// In our memory, at this address.
    Bytes(*const u8),
    Zero,
    Missing,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    pub fn new(limit_bytes: u64) -> Store {
        // One for each page that has bytes, and one of zeros beside it.
        let pages = (limit_bytes.min(MOST_BYTES) / PAGE) as usize;
        Store {
            limit_bytes,
            limit_stretches: 2 * pages + SPARE_STRETCHES,
            stretches: AtomicUsize::new(0),
            arena: Mutex::default(),
            slots: Mutex::default(),
            grains: Mutex::default(),
            spaces: Mutex::default(),
            arrived: Mutex::default(),
        }
    }

    /// Keeps the pages of the ranges, whose bytes come one after the other.
    pub fn put(
        &self,
        space: Space,
        ranges: &[PageRange],
        bytes: &[u8],
        round: u32,
    ) -> Result<(), MemoryError> {
        let length = ranges.iter().map(|range| range.bytes()).sum::<u64>();
        if length != bytes.len() as u64 {
            let text = format!("{} bytes came for {length} of pages of {space}", bytes.len());
            return Err(MemoryError::Invalid(text));
        }
        let kept = self.kept(space);
        let mut rest = bytes;
        for &range in ranges {
            let (these, others) = rest.split_at(range.bytes() as usize);
            rest = others;
            let wanted: Vec<PageRange> = match &*lock(&kept.missing) {
                // What nobody expects was placed already, or never was.
                Some(missing) => missing.within(range).collect(),
                None => vec![range],
            };
            for part in wanted {
                let at = (part.start() - range.start()) as usize;
                self.put_range(&kept, part, &these[at..at + part.bytes() as usize], round)?;
            }
        }
        self.tell(&kept, space, ranges);
        Ok(())
    }

    /// Keeps the ranges as zero.
    pub fn zero(&self, space: Space, ranges: &[PageRange], round: u32) -> Result<(), MemoryError> {
        let kept = self.kept(space);
        for &range in ranges {
            let freed = {
                let _still = kept.moving.write().unwrap_or_else(PoisonError::into_inner);
                self.change(&kept, |index| {
                    let wanted: Vec<PageRange> = match &*lock(&kept.missing) {
                        Some(missing) => missing.within(range).collect(),
                        None => vec![range],
                    };
                    let mut freed = Vec::new();
                    for part in wanted {
                        freed.extend(index.remove(part));
                        index.insert(part, Place::Zero, round);
                    }
                    freed
                })
            };
            if self.stretches.load(Relaxed) > self.limit_stretches {
                return Err(MemoryError::Scattered { limit: self.limit_stretches });
            }
            self.give(&freed)?;
        }
        self.tell(&kept, space, ranges);
        Ok(())
    }

    /// These are the pages the space has: forgets all others, and fails if
    /// one of them is not here.
    pub fn present(&self, space: Space, pages: &PageSet) -> Result<(), MemoryError> {
        let missing = self.retain(space, pages)?;
        match missing.iter().next() {
            Some(range) => Err(MemoryError::Missing { space, address: range.start() }),
            None => Ok(()),
        }
    }

    /// The same where pages are still to come: from now on only they are let
    /// in. Answers how many.
    pub fn expect(&self, space: Space, pages: &PageSet) -> Result<u64, MemoryError> {
        let missing = self.retain(space, pages)?;
        let count = missing.pages();
        *lock(&self.kept(space).missing) = Some(missing);
        Ok(count)
    }

    /// Of the pages that were expected, those that have not come.
    pub fn missing(&self, space: Space) -> PageSet {
        lock(&self.kept(space).missing).clone().unwrap_or_default()
    }

    /// The same, of one stretch.
    pub fn lacking(&self, space: Space, within: PageRange) -> Vec<PageRange> {
        let kept = self.kept(space);
        let missing = lock(&kept.missing);
        missing.as_ref().map_or_else(Vec::new, |missing| missing.within(within).collect())
    }

    pub fn copy_out(
        &self,
        space: Space,
        range: PageRange,
        into: &mut [u8],
    ) -> Result<(), MemoryError> {
        if into.len() as u64 != range.bytes() {
            let text = format!("{} bytes have no room for {range}", into.len());
            return Err(MemoryError::Invalid(text));
        }
        let kept = self.kept(space);
        let _moving = kept.moving.read().unwrap_or_else(PoisonError::into_inner);
        let parts: Vec<_> = {
            let index = lock(&kept.index);
            if let Some(absent) = index.absent(range).iter().next() {
                return Err(MemoryError::Missing { space, address: absent.start() });
            }
            index.within(range).collect()
        };
        for (part, place, _) in parts {
            let at = (part.start() - range.start()) as usize;
            let into = &mut into[at..at + part.bytes() as usize];
            match place {
                Place::Slot(slot) => self.arena()?.read(slot * PAGE as usize, into),
                Place::Zero => into.fill(0),
            }
        }
        Ok(())
    }

    /// How much memory the pages take.
    pub fn bytes(&self) -> u64 {
        lock(&self.slots).used() as u64 * PAGE
    }

    pub fn spaces(&self) -> Vec<Space> {
        lock(&self.spaces).keys().copied().collect()
    }

    pub fn forget(&self, space: Space, range: PageRange) -> Result<(), MemoryError> {
        let kept = self.kept(space);
        let freed = {
            let _still = kept.moving.write().unwrap_or_else(PoisonError::into_inner);
            self.change(&kept, |index| index.remove(range))
        };
        self.give(&freed)
    }

    /// What is here, each with the round in which it came.
    pub(crate) fn rounds(&self, space: Space) -> Vec<(PageRange, u32)> {
        lock(&self.kept(space).index).all().collect()
    }

    /// Shows `each` where the pages of the range lie, in order, until it has
    /// seen enough; they stay there as long as it looks.
    pub(crate) fn pieces(
        &self,
        space: Space,
        range: PageRange,
        mut each: impl FnMut(PageRange, Piece) -> bool,
    ) -> Result<(), MemoryError> {
        let kept = self.kept(space);
        let _moving = kept.moving.read().unwrap_or_else(PoisonError::into_inner);
        let (parts, absent) = {
            let index = lock(&kept.index);
            (index.within(range).collect::<Vec<_>>(), index.absent(range))
        };
        let mut pieces = Vec::with_capacity(parts.len() + absent.ranges());
        for (part, place, _) in parts {
            let piece = match place {
                Place::Slot(slot) => {
                    let offset = slot * PAGE as usize;
                    Piece::Bytes(self.arena()?.address(offset, part.bytes() as usize))
                }
                Place::Zero => Piece::Zero,
            };
            pieces.push((part, piece));
        }
        pieces.extend(absent.iter().map(|part| (part, Piece::Missing)));
        pieces.sort_by_key(|(part, _)| *part);
        for (part, piece) in pieces {
            if !each(part, piece) {
                break;
            }
        }
        Ok(())
    }

    /// Calls `arrived` with everything that comes from now on.
    pub(crate) fn watch(&self, arrived: Option<Arrived>) {
        *lock(&self.arrived) = arrived;
    }

    fn put_range(
        &self,
        kept: &Kept,
        range: PageRange,
        bytes: &[u8],
        round: u32,
    ) -> Result<(), MemoryError> {
        let at = |part: PageRange| (part.start() - range.start()) as usize;
        let moving = kept.moving.read().unwrap_or_else(PoisonError::into_inner);
        let (here, absent) = self.change(kept, |index| {
            let zero: Vec<_> =
                index.within(range).filter(|(_, place, _)| *place == Place::Zero).collect();
            for (part, ..) in zero {
                index.remove(part);
            }
            index.refresh(range, round);
            (index.within(range).collect::<Vec<_>>(), index.absent(range))
        });
        let runs = self.take(absent.pages())?;
        let arena = self.arena()?;
        for (part, place, _) in here {
            if let Place::Slot(slot) = place {
                arena.write(slot * PAGE as usize, &bytes[at(part)..][..part.bytes() as usize]);
            }
        }
        // Bytes first, then the index: what can be found is whole.
        let mut fresh = Vec::new();
        let mut gaps = absent.iter();
        let mut gap = gaps.next();
        for mut run in runs {
            let (chunk, pages, begun) = (run.chunk(), run.pages, thread_time());
            while let Some(range) = gap.filter(|_| run.pages > 0) {
                let (part, rest) = range.split(run.pages as u64);
                arena.write(run.slot * PAGE as usize, &bytes[at(part)..][..part.bytes() as usize]);
                fresh.push((part, run.slot));
                run.slot += part.pages() as usize;
                run.pages -= part.pages() as usize;
                gap = rest.or_else(|| gaps.next());
            }
            lock(&self.grains).took(chunk, pages, thread_time().saturating_sub(begun));
        }
        let mut twice = Vec::new();
        self.change(kept, |index| {
            for (part, slot) in fresh {
                // Another lane may have brought the same pages meanwhile.
                twice.extend(index.remove(part));
                index.insert(part, Place::Slot(slot), round);
            }
        });
        drop(moving);
        if !twice.is_empty() {
            // Nobody looks at the pages that were replaced any more.
            drop(kept.moving.write());
            self.give(&twice)?;
        }
        Ok(())
    }

    fn retain(&self, space: Space, pages: &PageSet) -> Result<PageSet, MemoryError> {
        let kept = self.kept(space);
        let mut missing = pages.clone();
        let mut freed = Vec::new();
        {
            let _still = kept.moving.write().unwrap_or_else(PoisonError::into_inner);
            self.change(&kept, |index| {
                let mut others: PageSet = index.all().map(|(range, _)| range).collect();
                missing.subtract(&others);
                others.subtract(pages);
                for range in others.iter() {
                    freed.extend(index.remove(range));
                }
            });
        }
        self.give(&freed)?;
        Ok(missing)
    }

    /// Every change of an index goes through here, and is counted.
    fn change<T>(&self, kept: &Kept, change: impl FnOnce(&mut Index) -> T) -> T {
        let mut index = lock(&kept.index);
        let before = index.stretches();
        let answer = change(&mut index);
        // Wraps where it has become less, as the sum does.
        self.stretches.fetch_add(index.stretches().wrapping_sub(before), Relaxed);
        answer
    }

    fn tell(&self, kept: &Kept, space: Space, ranges: &[PageRange]) {
        if let Some(missing) = &mut *lock(&kept.missing) {
            for range in ranges {
                missing.remove(*range);
            }
        }
        let arrived = lock(&self.arrived).clone();
        if let Some(arrived) = arrived {
            arrived(space, ranges);
        }
    }

    fn take(&self, pages: u64) -> Result<Vec<Run>, MemoryError> {
        let full = MemoryError::Full { limit_bytes: self.limit_bytes };
        let arena = self.arena()?;
        let runs = {
            let mut slots = lock(&self.slots);
            if (slots.used() as u64 + pages).saturating_mul(PAGE) > self.limit_bytes {
                return Err(full);
            }
            slots.take(pages as usize, arena.chunks()).ok_or(full)?
        };
        if let Some(last) = runs.iter().map(Run::chunk).max() {
            arena
                .open(last, || lock(&self.grains).next() == Grain::Huge)
                .map_err(|source| MemoryError::System { what: "opening the store", source })?;
        }
        Ok(runs)
    }

    fn give(&self, runs: &[Run]) -> Result<(), MemoryError> {
        if runs.is_empty() {
            return Ok(());
        }
        let empty = lock(&self.slots).give(runs);
        let arena = self.arena()?;
        for chunk in empty {
            arena
                .release(chunk)
                .map_err(|source| MemoryError::System { what: "emptying the store", source })?;
            lock(&self.slots).given_back(chunk);
        }
        Ok(())
    }

    fn kept(&self, space: Space) -> Arc<Kept> {
        Arc::clone(lock(&self.spaces).entry(space).or_default())
    }

    fn arena(&self) -> Result<Arc<Arena>, MemoryError> {
        let mut arena = lock(&self.arena);
        if let Some(arena) = &*arena {
            return Ok(Arc::clone(arena));
        }
        let chunks = self.limit_bytes.min(MOST_BYTES) as usize / CHUNK + 1 + SLACK_CHUNKS;
        let made = Arena::reserve(chunks)
            .map_err(|source| MemoryError::System { what: "reserving the store", source })?;
        Ok(Arc::clone(arena.insert(Arc::new(made))))
    }
}

#[cfg(test)]
mod tests;
