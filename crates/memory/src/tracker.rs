//! Watches the memory of all processes of a container while they run.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use tracing::{debug, info};
use transship_types::{PAGE, PageRange, PageSet, Space};

use crate::{
    Backend, Dirty, Last, Memory, MemoryError,
    dirty::{Chosen, Cost, Watch},
    maps, read,
    spaces::{self, Process},
};

/// Which way to notice writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// The best one that this kernel has.
    Best,
    Only(Backend),
}

const BEST_FIRST: [Backend; 3] = [Backend::WriteProtect, Backend::SoftDirty, Backend::None];

/// Lists a container's processes, by their ids on this host.
pub type Pids = Box<dyn Fn() -> io::Result<Vec<i32>> + Send + Sync>;

/// What watching has cost so far.
#[derive(Debug, Clone, Default)]
pub struct Statistics {
    pub rounds: u32,
    /// Processes that were stopped for a moment, and for how long.
    pub stops: u32,
    pub stopped_longest: Duration,
    pub stopped_total: Duration,
    /// Spent on memory that was not watched before; the first round is all
    /// that.
    pub arming: Duration,
    /// Spent by the last round on memory that was watched.
    pub scan: Duration,
    /// Those whose memory could not be watched in the last round, and why:
    /// all of it counted as changed.
    pub unwatched: Vec<(Space, String)>,
}

/// The memory of a container, process by process. See [`Memory`].
pub struct Tracker {
    pids: Pids,
    chosen: Chosen,
    /// Held for a round's duration.
    state: Mutex<State>,
    /// For those who read meanwhile.
    readable: RwLock<BTreeMap<Space, Arc<Process>>>,
    /// The pages of code that were read with the last scan; see [`kept`].
    code: RwLock<BTreeMap<(Space, u64), Page>>,
}

type Page = Box<[u8]>;

/// How much of an executable mapping's begin is read with the last scan.
const CODE: u64 = 2 * PAGE;

#[derive(Default)]
struct State {
    processes: BTreeMap<Space, Arc<Process>>,
    watches: BTreeMap<Space, Box<dyn Watch>>,
    statistics: Statistics,
    disarmed: bool,
}

impl Tracker {
    /// `pids` is asked anew in every round. Nothing is touched before the
    /// first.
    pub fn new(pids: Pids, want: Want) -> Result<Self, MemoryError> {
        let chosen = match want {
            Want::Best => Chosen::choose(&BEST_FIRST),
            Want::Only(backend) => Chosen::choose(&[backend]),
        }?;
        let (state, readable, code) = Default::default();
        Ok(Self { pids, chosen, state, readable, code })
    }

    /// The address spaces as of the last call, with the process (on this
    /// host) that stands for each.
    pub fn spaces(&self) -> Vec<(Space, i32)> {
        let readable = self.readable.read().unwrap_or_else(PoisonError::into_inner);
        readable.iter().map(|(space, process)| (*space, process.pid)).collect()
    }

    pub fn statistics(&self) -> Statistics {
        self.state().statistics.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in which processes there are. One that is new has not been
    /// watched: its watch names everything.
    fn survey(&self, state: &mut State) -> Result<(), MemoryError> {
        let pids = (self.pids)()
            .map_err(|source| MemoryError::System { what: "listing the processes", source })?;
        let processes = spaces::survey(&pids, &state.processes)?;
        let mut before = std::mem::take(&mut state.watches);
        for (space, process) in &processes {
            let same = state.processes.get(space).is_some_and(|known| Arc::ptr_eq(known, process));
            let watch = before.remove(space).filter(|_| same);
            state.watches.insert(*space, watch.unwrap_or_else(|| self.chosen.watch()));
        }
        self.readable.write().unwrap_or_else(PoisonError::into_inner).clone_from(&processes);
        state.processes = processes;
        Ok(())
    }
}

/// The first pages of code that changed, as they are now.
///
/// CRIU runs system calls in the tasks that it dumps by putting the
/// instruction for them at the begin of a task's first executable mapping, and
/// the old bytes back afterwards. What was named before it began shall not be
/// read while it does so.
fn kept(process: &Process, dirty: &PageSet) -> Result<Vec<(u64, Page)>, MemoryError> {
    let maps = ended_is_empty(process, maps::of(process.pid))?;
    let mut pages = Vec::new();
    for mapping in maps.iter().filter(|mapping| mapping.executable && mapping.moves()) {
        let (begin, _) = mapping.range.split(CODE / PAGE);
        for range in dirty.within(begin) {
            let mut bytes = vec![0; range.bytes() as usize];
            if read::read(process, &[range], &mut bytes)?.is_empty() {
                let addresses = (range.start()..range.end()).step_by(PAGE as usize);
                pages.extend(addresses.zip(bytes.chunks(PAGE as usize).map(Page::from)));
            }
        }
    }
    Ok(pages)
}

/// A process that ended meanwhile has no pages.
fn ended_is_empty<T: Default>(process: &Process, pages: io::Result<T>) -> Result<T, MemoryError> {
    match pages {
        Err(error) if maps::gone(&error) => Ok(T::default()),
        pages => pages.map_err(|source| MemoryError::Process {
            what: "watching the memory",
            pid: process.pid,
            source,
        }),
    }
}

impl Memory for Tracker {
    fn backend(&self) -> Backend {
        self.chosen.backend()
    }

    fn round(&self) -> Result<Dirty, MemoryError> {
        let mut state = self.state();
        if state.disarmed {
            return Err(MemoryError::Invalid("this memory is no longer watched".into()));
        }
        self.survey(&mut state)?;
        self.code.write().unwrap_or_else(PoisonError::into_inner).clear();
        let State { processes, watches, statistics, .. } = &mut *state;
        statistics.rounds += 1;
        statistics.scan = Duration::ZERO;
        statistics.unwatched.clear();
        let mut dirty = Dirty::default();
        for (space, process) in &*processes {
            let Some(watch) = watches.get_mut(space) else { continue };
            let mut cost = Cost::default();
            let pages = ended_is_empty(process, watch.round(process, &mut cost))?;
            statistics.add(*space, cost);
            if !pages.is_empty() {
                dirty.spaces.push((*space, pages));
            }
        }
        debug!(
            spaces = processes.len(),
            pages = dirty.pages(),
            scan_us = statistics.scan.as_micros() as u64,
            "looked for what was written"
        );
        Ok(dirty)
    }

    fn peek(&self) -> Result<u64, MemoryError> {
        let mut state = self.state();
        self.survey(&mut state)?;
        let mut pages = 0;
        for (space, process) in &state.processes {
            if let Some(watch) = state.watches.get(space) {
                pages += ended_is_empty(process, watch.look(process))?.dirty.pages();
            }
        }
        Ok(pages)
    }

    fn last(&self) -> Result<Last, MemoryError> {
        let begin = Instant::now();
        let mut state = self.state();
        self.survey(&mut state)?;
        let mut last = Last::default();
        let mut code = BTreeMap::new();
        for (space, process) in &state.processes {
            let Some(watch) = state.watches.get(space) else { continue };
            let pages = ended_is_empty(process, watch.look(process))?;
            for (address, page) in kept(process, &pages.dirty)? {
                code.insert((*space, address), page);
            }
            if !pages.dirty.is_empty() {
                last.dirty.spaces.push((*space, pages.dirty));
            }
            last.present.push((*space, pages.present));
        }
        *self.code.write().unwrap_or_else(PoisonError::into_inner) = code;
        last.scan = begin.elapsed();
        Ok(last)
    }

    fn read(
        &self,
        space: Space,
        ranges: &[PageRange],
        into: &mut [u8],
    ) -> Result<Vec<PageRange>, MemoryError> {
        let readable = self.readable.read().unwrap_or_else(PoisonError::into_inner);
        let process = readable.get(&space).cloned();
        drop(readable);
        let Some(process) = process else {
            // It has ended since it was named.
            into.fill(0);
            return Ok(ranges.to_vec());
        };
        let gone = read::read(&process, ranges, into)?;
        let code = self.code.read().unwrap_or_else(PoisonError::into_inner);
        let mut begin = 0;
        for range in ranges {
            for ((_, address), page) in code.range((space, range.start())..(space, range.end())) {
                let at = begin + (address - range.start()) as usize;
                into[at..at + page.len()].copy_from_slice(page);
            }
            begin += range.bytes() as usize;
        }
        Ok(gone)
    }

    fn disarm(&self) {
        let mut state = self.state();
        // Dropping a watch takes it off, which the kernel needs some time for
        // where there is much memory.
        state.watches.clear();
        if !std::mem::replace(&mut state.disarmed, true) {
            let Statistics { rounds, stops, .. } = state.statistics;
            info!(rounds, stops, "memory is no longer watched");
        }
    }
}

impl Statistics {
    fn add(&mut self, space: Space, cost: Cost) {
        if let Some(stopped) = cost.stopped {
            self.stops += 1;
            self.stopped_total += stopped;
            self.stopped_longest = self.stopped_longest.max(stopped);
        }
        self.arming += cost.arming;
        self.scan += cost.scanning;
        self.unwatched.extend(cost.unwatched.map(|why| (space, why)));
    }
}
