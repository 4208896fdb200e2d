//! Memory that is a table, with a workload that writes while nobody looks, and
//! a store that can fail.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use transship_memory::{Backend, Dirty, Last, Memory, MemoryError, Store};
use transship_types::{PAGE, PageRange, PageSet, Space};

use super::Step;
use crate::{PageStore, pages::PageSink};

const SPACES: [Space; 2] = [Space::Process(1), Space::Process(7)];

/// A page, and whose it is.
type Page = (Space, u64);

/// Two processes that write.
#[derive(Debug)]
pub struct FakeMemory {
    state: Mutex<State>,
    /// Pages written between two looks at full speed.
    writes: u32,
    /// Processor time taken away, in percent.
    pub throttle: AtomicU32,
    /// Its writes are being noticed.
    pub watched: AtomicBool,
    fails: Option<Step>,
}

#[derive(Debug)]
struct State {
    /// What exists, and which write it is from.
    pages: BTreeMap<Page, u64>,
    dirty: BTreeSet<Page>,
    /// Numbers of pages go up to here.
    size: u64,
    random: u64,
}

impl FakeMemory {
    /// `size` pages per process, all of them written once.
    pub fn new(size: u64, writes: u32, fails: Option<Step>) -> Self {
        let all = || SPACES.into_iter().flat_map(|space| (1..=size).map(move |page| (space, page)));
        let state = State {
            pages: all().enumerate().map(|(n, page)| (page, n as u64)).collect(),
            dirty: all().collect(),
            size,
            random: 88_172_645_463_325_252,
        };
        Self {
            state: Mutex::new(state),
            writes,
            throttle: AtomicU32::new(0),
            watched: AtomicBool::new(false),
            fails,
        }
    }

    /// All there is, for comparison.
    pub fn contents(&self) -> BTreeMap<Page, Vec<u8>> {
        self.state().pages.iter().map(|(page, write)| (*page, content(*page, *write))).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, step: Step) -> Result<(), MemoryError> {
        if self.fails == Some(step) {
            return Err(MemoryError::Invalid(format!("{step:?} fails as asked")));
        }
        Ok(())
    }

    /// As much as the processes do between two looks.
    fn work(&self, state: &mut State) {
        let left = 100 - self.throttle.load(Ordering::SeqCst);
        for _ in 0..self.writes * left / 100 {
            state.write();
        }
    }
}

impl State {
    fn write(&mut self) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let random = self.random;
        let page = (SPACES[random as usize % 2], (random >> 8) % self.size + 1);
        if random >> 40 & 31 == 0 {
            // Given back, as MADV_DONTNEED does.
            self.pages.remove(&page);
            self.dirty.remove(&page);
        } else {
            self.pages.insert(page, random >> 16);
            self.dirty.insert(page);
        }
    }

    fn take_dirty(&mut self) -> Dirty {
        Dirty { spaces: sets(std::mem::take(&mut self.dirty)) }
    }
}

fn sets(pages: impl IntoIterator<Item = Page>) -> Vec<(Space, PageSet)> {
    let mut sets: BTreeMap<Space, PageSet> = BTreeMap::new();
    for (space, page) in pages {
        sets.entry(space).or_default().insert(range(page));
    }
    sets.into_iter().collect()
}

fn range(page: u64) -> PageRange {
    PageRange::of_pages(page * PAGE, 1).expect("a page below the limit")
}

fn pages_of(ranges: &[PageRange]) -> impl Iterator<Item = u64> {
    ranges.iter().flat_map(|range| range.start() / PAGE..range.end() / PAGE)
}

/// Every fifth write clears its page.
fn content((space, page): Page, write: u64) -> Vec<u8> {
    if write.is_multiple_of(5) {
        return vec![0; PAGE as usize];
    }
    let text = format!("{space} page {page} write {write};");
    text.bytes().cycle().take(PAGE as usize).collect()
}

impl Memory for FakeMemory {
    fn backend(&self) -> Backend {
        Backend::WriteProtect
    }

    fn round(&self) -> Result<Dirty, MemoryError> {
        self.watched.store(true, Ordering::SeqCst);
        self.fail(Step::Scan)?;
        let mut state = self.state();
        let dirty = state.take_dirty();
        // Also what is being sent may change under the reader's hands.
        self.work(&mut state);
        Ok(dirty)
    }

    fn peek(&self) -> Result<u64, MemoryError> {
        self.fail(Step::Peek)?;
        Ok(self.state().dirty.len() as u64)
    }

    fn last(&self) -> Result<Last, MemoryError> {
        self.fail(Step::LastScan)?;
        let mut state = self.state();
        let dirty = state.take_dirty();
        let lie = (self.fails == Some(Step::Lie)).then_some((SPACES[0], state.size + 1));
        let present = sets(state.pages.keys().copied().chain(lie));
        Ok(Last { dirty, present, scan: Duration::from_micros(1) })
    }

    fn read(
        &self,
        space: Space,
        ranges: &[PageRange],
        into: &mut [u8],
    ) -> Result<Vec<PageRange>, MemoryError> {
        self.fail(Step::Read)?;
        let state = self.state();
        let mut gone = Vec::new();
        for (page, into) in pages_of(ranges).zip(into.chunks_mut(PAGE as usize)) {
            match state.pages.get(&(space, page)) {
                Some(write) => into.copy_from_slice(&content((space, page), *write)),
                None => {
                    into.fill(0);
                    gone.push(range(page));
                }
            }
        }
        Ok(gone)
    }

    fn disarm(&self) {
        self.watched.store(false, Ordering::SeqCst);
        // Nobody knows any more what was written since.
        let mut state = self.state();
        state.dirty = state.pages.keys().copied().collect();
    }
}

/// The real store, which fails where it is told to.
pub struct FakeStore {
    store: Store,
    fails: Option<Step>,
}

impl FakeStore {
    pub fn new(fails: Option<Step>) -> Self {
        /// More than any test has.
        const LIMIT: u64 = 256 << 20;
        Self { store: Store::new(LIMIT), fails }
    }

    /// Of the pages that `present` names.
    pub fn contents(&self, present: &[(Space, PageSet)]) -> BTreeMap<Page, Vec<u8>> {
        let mut contents = BTreeMap::new();
        for (space, pages) in present {
            for page in pages.iter().flat_map(|range| pages_of(&[range]).collect::<Vec<_>>()) {
                let mut bytes = vec![0; PAGE as usize];
                self.store.copy_out(*space, range(page), &mut bytes).expect("a page that is here");
                contents.insert((*space, page), bytes);
            }
        }
        contents
    }

    pub fn bytes(&self) -> u64 {
        self.store.bytes()
    }
}

impl PageSink for FakeStore {
    fn put(
        &self,
        space: Space,
        ranges: &[PageRange],
        bytes: &[u8],
        round: u32,
    ) -> Result<(), MemoryError> {
        if self.fails == Some(Step::Store) {
            return Err(MemoryError::Full { limit_bytes: 0 });
        }
        self.store.put(space, ranges, bytes, round)
    }

    fn zero(&self, space: Space, ranges: &[PageRange], round: u32) -> Result<(), MemoryError> {
        self.store.zero(space, ranges, round)
    }
}

impl PageStore for FakeStore {
    fn present(&self, space: Space, pages: &PageSet) -> Result<(), MemoryError> {
        self.store.present(space, pages)
    }

    fn expect(&self, space: Space, pages: &PageSet) -> Result<u64, MemoryError> {
        self.store.expect(space, pages)
    }

    fn missing(&self, space: Space) -> PageSet {
        self.store.missing(space)
    }

    fn lacking(&self, space: Space, within: PageRange) -> Vec<PageRange> {
        self.store.lacking(space, within)
    }

    fn spaces(&self) -> Vec<Space> {
        self.store.spaces()
    }
}
