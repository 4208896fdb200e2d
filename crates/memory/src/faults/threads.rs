//! The threads that answer faults, and those that fill in between.

use std::{
    sync::{Arc, PoisonError, atomic::Ordering::*},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::epoll::{EpollEvent, EpollTimeout},
};
use transship_types::{PAGE, PageRange};

use super::{
    ARRIVAL, ENDING, Parked, Shared, lock,
    task::{Placing, Task},
};
use crate::MemoryError;

/// Pages placed with one that was asked for: memory is used in the
/// neighbourhood, and this many take about as long as two faults.
const AROUND: u64 = 16;

/// Pages the fill places at once. Runs longer than 64 KiB are hardly faster,
/// and a fault or an event may have to wait for one.
const RUN: u64 = 32;

/// Pages given back to the store at once.
const TIDY: u64 = 512;

/// The longest the fill lets faults go first: a tree that faults without end
/// is filled all the same.
const YIELD: Duration = Duration::from_millis(1);

/// When to try again what could not be placed.
const RETRY: Duration = Duration::from_millis(1);

/// A restored page may have no place while its process unmaps it, until we
/// read of that. If it stays so, CRIU has not left to us what we were told.
const UNMAPPED: Duration = Duration::from_secs(3);

/// In a fork it may be memory that forks do not inherit (MADV_DONTFORK).
const UNMAPPED_IN_FORK: Duration = Duration::from_millis(100);

/// Answers faults until it is time to end.
pub(super) fn answer(shared: &Shared) {
    if let Err(error) = answer_all(shared) {
        shared.fail(error);
    }
}

fn answer_all(shared: &Shared) -> Result<(), MemoryError> {
    let mut ready = [EpollEvent::empty(); 8];
    loop {
        let parked = !lock(&shared.parked).is_empty();
        let timeout = if parked { EpollTimeout::from(1_u8) } else { EpollTimeout::NONE };
        let count = match shared.epoll.wait(&mut ready, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => {
                let what = "waiting for faults";
                return Err(MemoryError::System { what, source: errno.into() });
            }
        };
        let since = Instant::now();
        shared.busy.fetch_add(1, SeqCst);
        let answered = (|| {
            for event in &ready[..count] {
                if event.data() == ENDING {
                    return Ok(false);
                }
                if event.data() == ARRIVAL {
                    // Another thread may have been faster: nothing to read.
                    let _ = shared.arrival.read();
                }
                let task = lock(&shared.tasks).get(&event.data()).cloned();
                if let Some(task) = task {
                    attend(shared, &task, since)?;
                }
            }
            retry(shared)?;
            Ok(true)
        })();
        shared.busy.fetch_sub(1, SeqCst);
        if !answered? {
            return Ok(());
        }
    }
}

/// Reads what a task's descriptor tells, and answers its faults: first all
/// who wait, then what lies around.
fn attend(shared: &Shared, task: &Arc<Task>, since: Instant) -> Result<(), MemoryError> {
    let mut refused = Ok(());
    let faults = task.read(|uffd, make| {
        let id = shared.next_id.fetch_add(1, Relaxed);
        refused = shared.add(make(id, uffd));
    })?;
    refused.map_err(|source| MemoryError::System { what: "adopting a fork", source })?;
    for &page in &faults {
        fault(shared, Parked { task: Arc::clone(task), page, since, asked: false })?;
    }
    for page in faults {
        let window = AROUND * PAGE;
        let start = page.start() / window * window;
        if let Ok(around) = PageRange::of_pages(start, AROUND) {
            let (_, pages) = task.place(&shared.store, around, false)?;
            lock(&shared.served).pages += pages;
        }
    }
    shared.close_if_filled(task)
}

fn fault(shared: &Shared, mut fault: Parked) -> Result<(), MemoryError> {
    let (placing, pages) = fault.task.place(&shared.store, fault.page, true)?;
    match placing {
        Placing::Done => {}
        Placing::Gone => gone(shared, &fault.task)?,
        // It looks again, and finds what is there now.
        Placing::Unmapped(_) => fault.task.wake(fault.page),
        Placing::Again => {
            lock(&shared.parked).push(fault);
            return Ok(());
        }
        Placing::Missing(address) => {
            let space = fault.task.space();
            let Some(source) = &shared.options.source else {
                return Err(MemoryError::Missing { space, address });
            };
            if !std::mem::replace(&mut fault.asked, true) {
                source(space, address);
            }
            lock(&shared.parked).push(fault);
            return Ok(());
        }
    }
    let mut served = lock(&shared.served);
    served.faults += 1;
    served.pages += pages;
    let last = served.fault_latency.len() - 1;
    let micros = fault.since.elapsed().as_micros().max(1);
    let bucket = micros.div_ceil(16).next_power_of_two().ilog2() as usize;
    served.fault_latency[bucket.min(last)] += 1;
    Ok(())
}

/// Tries again what had to wait: for an event to be read, or for a page.
fn retry(shared: &Shared) -> Result<(), MemoryError> {
    let parked = std::mem::take(&mut *lock(&shared.parked));
    for waiting in parked {
        attend(shared, &Arc::clone(&waiting.task), Instant::now())?;
        fault(shared, waiting)?;
    }
    Ok(())
}

fn gone(shared: &Shared, task: &Task) -> Result<(), MemoryError> {
    task.forget(None);
    shared.close_if_filled(task)
}

/// Places what nobody has asked for, until nothing is left.
pub(super) fn fill(shared: &Shared) {
    if let Err(error) = fill_all(shared) {
        shared.fail(error);
    }
}

fn fill_all(shared: &Shared) -> Result<(), MemoryError> {
    let mut from = 0;
    let mut idle = 0;
    while let Some(pause) = turn(shared) {
        if pause {
            continue;
        }
        let Some((task, range)) = next(shared, &mut from) else {
            rest(shared, RETRY);
            continue;
        };
        let (placing, pages) = task.place(&shared.store, range, false)?;
        lock(&shared.served).pages += pages;
        match placing {
            Placing::Done | Placing::Again | Placing::Missing(_) => {}
            Placing::Gone => task.forget(None),
            Placing::Unmapped(page) => unmapped(&task, page)?,
        }
        if let (Placing::Missing(address), None) = (placing, &shared.options.source) {
            return Err(MemoryError::Missing { space: task.space(), address });
        }
        task.tidy(&shared.store, TIDY)?;
        shared.close_if_filled(&task)?;
        // Nothing moves: wait for what must come first.
        idle = if placing == Placing::Done { 0 } else { idle + 1 };
        if idle > lock(&shared.tasks).len() {
            rest(shared, RETRY);
        }
        if let Some(limit) = shared.options.fill_limit.filter(|_| pages > 0) {
            rest(shared, Duration::from_secs_f64((pages * PAGE) as f64 / limit.max(1) as f64));
        }
    }
    Ok(())
}

/// Waits until it is the fill's turn: `None` when it is time to end, true to
/// ask again.
fn turn(shared: &Shared) -> Option<bool> {
    let mut state = shared.state();
    while state.finished.is_none() && !state.stopping {
        state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    if state.stopping {
        return None;
    }
    drop(state);
    let since = Instant::now();
    while shared.busy.load(SeqCst) > 0 && since.elapsed() < YIELD {
        std::thread::yield_now();
    }
    Some(false)
}

/// The hottest stretch; after those, one of each task in turn.
fn next(shared: &Shared, from: &mut u64) -> Option<(Arc<Task>, PageRange)> {
    let hot = {
        let mut state = shared.state();
        state.hot.pop_front().map(|(task, range)| {
            let (run, rest) = range.split(RUN);
            if let Some(rest) = rest {
                state.hot.push_front((task, rest));
            }
            (task, run)
        })
    };
    let tasks = lock(&shared.tasks);
    if let Some((id, range)) = hot
        && let Some(task) = tasks.get(&id)
    {
        return Some((Arc::clone(task), range));
    }
    let after = tasks.keys().copied().filter(|id| id > from).min();
    *from = after.or_else(|| tasks.keys().copied().min())?;
    let task = Arc::clone(tasks.get(from)?);
    drop(tasks);
    match task.next(RUN) {
        Some(range) => Some((task, range)),
        None => PageRange::of_pages(0, 1).ok().map(|nothing| (task, nothing)),
    }
}

fn unmapped(task: &Task, page: u64) -> Result<(), MemoryError> {
    let patience = if task.primary { UNMAPPED } else { UNMAPPED_IN_FORK };
    if task.unmapped_since(page).elapsed() < patience {
        return Ok(());
    }
    if task.primary {
        let text = format!("CRIU left no place for page {page:#x} of {}", task.space());
        return Err(MemoryError::Invalid(text));
    }
    task.forget(PageRange::of_pages(page, 1).ok());
    Ok(())
}

/// Waits that long, or until something changes.
fn rest(shared: &Shared, time: Duration) {
    let state = shared.state();
    if !state.stopping {
        drop(shared.changed.wait_timeout(state, time));
    }
}
