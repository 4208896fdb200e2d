//! What a migration of a container would have to cope with: its memory is
//! watched for a while, as rounds would watch it, and then left alone.
//!
//! Nothing is held back meanwhile, neither a pause nor an exec. Only a
//! departure wants to watch by itself, and ends this one.

mod heat;
mod surroundings;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    runtime::Handle,
    sync::watch::{self, Receiver, Sender},
    time,
};
use tokio_util::sync::CancellationToken;
use transship_api::control::WatchResponse;
use transship_memory::{Backend, Dirty, Memory, MemoryError, Tracker, Want, codec};
use transship_types::{PAGE, PageRange, quantity::micros};

use self::heat::Heat;
use crate::{
    cgroup::Cgroup,
    container::{Container, Status},
    error::{Error, Result},
};

/// As long as a pause may last that people ask for: a page that is written
/// twice meanwhile must be sent once.
const INTERVAL: Duration = Duration::from_millis(100);
/// For longer watches the intervals grow instead.
const INTERVALS: u32 = 100;
const LONGEST: Duration = Duration::from_secs(60);

/// Pages that are read to see how many are zero all over: enough to know it
/// within some percent.
const SAMPLE: u64 = 1024;

/// How to end a watch, and what ends with it.
type Place = (CancellationToken, Receiver<()>);

/// Which containers are watched now, each once.
#[derive(Clone, Default)]
pub struct Watches(Arc<Mutex<HashMap<String, Place>>>);

/// A container that is watched, until this is dropped.
pub struct Watched {
    all: Watches,
    id: String,
    cancel: CancellationToken,
    /// Dropped last: whoever waits for the end finds the place free.
    _over: Sender<()>,
}

impl Watches {
    pub fn begin(&self, id: &str) -> Result<Watched> {
        let (over, ends) = watch::channel(());
        let cancel = CancellationToken::new();
        let mut places = self.places();
        if places.contains_key(id) {
            return Err(Error::FailedPrecondition(format!("{id} is being watched already")));
        }
        places.insert(id.to_owned(), (cancel.clone(), ends));
        Ok(Watched { all: self.clone(), id: id.to_owned(), cancel, _over: over })
    }

    /// Ends a watch, if there is one, and returns once its traces are gone.
    pub async fn end(&self, id: &str) {
        let found = self.places().get(id).cloned();
        if let Some((cancel, mut ends)) = found {
            cancel.cancel();
            // Nothing is ever sent: this ends with the sender.
            let _ = ends.changed().await;
        }
    }

    fn places(&self) -> MutexGuard<'_, HashMap<String, Place>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.all.places().remove(&self.id);
    }
}

/// Watches for so long, more or less: at least one interval.
pub async fn watch(
    container: &Container,
    duration: Duration,
    watched: Watched,
) -> Result<WatchResponse> {
    if duration > LONGEST {
        return Err(Error::InvalidArgument(format!("watching for more than {LONGEST:?}")));
    }
    // Waits for memory that is still being put in place here: two cannot have
    // an eye on it. Given back at once, and nobody is kept from anything.
    drop(container.occupy().await?);
    let report = container.state("").await?;
    if report.status != Status::Running {
        let why = format!("{} does not run: there are no writes to watch", watched.id);
        return Err(Error::FailedPrecondition(why));
    }
    let init = report.pid as i32;
    let cgroup = Cgroup::of_process(init)?;
    let runtime = Handle::current();
    let work = move || {
        // Until the last trace is gone.
        let watched = watched;
        let surroundings = surroundings::survey(&pids(&cgroup)?, init);
        let mut response = observe(cgroup, duration, &watched.cancel, &runtime)?;
        surroundings.tell(&mut response);
        Ok(response)
    };
    tokio::task::spawn_blocking(work).await.map_err(Error::other("watch the container"))?
}

fn pids(cgroup: &Cgroup) -> Result<Vec<i32>> {
    Ok(cgroup.pids()?.into_iter().filter_map(|pid| i32::try_from(pid).ok()).collect())
}

fn observe(
    cgroup: Cgroup,
    duration: Duration,
    cancel: &CancellationToken,
    runtime: &Handle,
) -> Result<WatchResponse> {
    let failed = || Error::other("watch the container's memory");
    let list = move || pids(&cgroup).map_err(std::io::Error::other);
    let tracker = Tracker::new(Box::new(list), Want::Best).map_err(failed())?;
    let mut response = WatchResponse::new();
    response.backend = tracker.backend().as_str().into();
    response.page_size = PAGE;

    let everything = tracker.round().map_err(failed())?;
    response.pages = everything.pages();
    response.processes = tracker.spaces().len() as u32;
    response.zero_pages = zero_pages(&tracker, &everything).map_err(failed())?;
    if tracker.backend() == Backend::None {
        response.fallback = why_not_watched();
        return Ok(response);
    }

    let interval = INTERVAL.max(duration / INTERVALS);
    let intervals = duration.as_micros().div_ceil(interval.as_micros()).max(1);
    let mut heat = Heat::new(everything.pages());
    let began = Instant::now();
    let mut scans = Vec::new();
    for number in 1..=u32::try_from(intervals).unwrap_or(INTERVALS) {
        let until = began + interval * number;
        let wait = time::sleep_until(until.into());
        let cancelled = runtime.block_on(async {
            tokio::select! {
                () = wait => false,
                () = cancel.cancelled() => true,
            }
        });
        if cancelled {
            return Err(Error::Cancelled("a departure has begun".into()));
        }
        let written = tracker.round().map_err(failed())?;
        scans.push(tracker.statistics().scan);
        response.written.push(written.pages());
        heat.add(&written);
    }
    let took = began.elapsed();
    tracker.disarm();

    let count = response.written.len();
    let all: u64 = response.written.iter().sum();
    response.interval_us = micros(took) / count.max(1) as u64;
    response.written_pages = heat.written();
    response.hot_pages = heat.hot(count);
    response.dirty_pages_rate = (all as f64 / took.as_secs_f64().max(1e-3)) as u64;
    let statistics = tracker.statistics();
    response.arm_us = micros(statistics.arming);
    response.scan_us = micros(median(scans));
    response.stopped_us = micros(statistics.stopped_longest);
    response.fallback = statistics
        .unwatched
        .iter()
        .map(|(space, why)| format!("{space}: {why}"))
        .collect::<Vec<_>>()
        .join("; ");
    if tracker.backend() != Backend::WriteProtect && response.fallback.is_empty() {
        response.fallback = why_not_watched();
    }
    Ok(response)
}

/// Why the best backend is not the one that is used.
fn why_not_watched() -> String {
    let nobody = Box::new(|| Ok(Vec::new()));
    match Tracker::new(nobody, Want::Only(Backend::WriteProtect)) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    }
}

/// By a sample of pages that lie equally far apart.
fn zero_pages(tracker: &Tracker, all: &Dirty) -> std::result::Result<u64, MemoryError> {
    let pages = all.pages();
    let step = pages.div_ceil(SAMPLE).max(1);
    let (mut seen, mut zero, mut next, mut before) = (0u64, 0u64, 0, 0);
    let mut bytes = [0; PAGE as usize];
    for (space, set) in &all.spaces {
        for range in set.iter() {
            while next < before + range.pages() {
                let start = range.start() + (next - before) * PAGE;
                // Within a range of whole pages.
                let Ok(page) = PageRange::of_pages(start, 1) else { break };
                next += step;
                if tracker.read(*space, &[page], &mut bytes)?.is_empty() {
                    seen += 1;
                    zero += u64::from(codec::is_zero(&bytes));
                }
            }
            before += range.pages();
        }
    }
    Ok(if seen == 0 { 0 } else { (zero as f64 / seen as f64 * pages as f64) as u64 })
}

/// What the next one will most likely take: one of many met something else.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_container_is_watched_once_and_whoever_ends_it_waits() {
        let watches = Watches::default();
        let first = watches.begin("a").unwrap();
        assert!(watches.begin("a").is_err());
        let _other = watches.begin("b").unwrap();
        let ending = tokio::spawn({
            let watches = watches.clone();
            async move { watches.end("a").await }
        });
        first.cancel.cancelled().await;
        assert!(!ending.is_finished());
        drop(first);
        ending.await.unwrap();
        watches.begin("a").unwrap();
        watches.end("nobody").await;
    }
}
