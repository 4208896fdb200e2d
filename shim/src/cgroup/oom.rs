//! Out-of-memory events.
//!
//! v1 tells them by an eventfd that is registered with the memory controller,
//! v2 by a change of `memory.events`, which wakes a poll for priority data
//! (cgroup-v2.rst, "poll and inotify"). A container whose first process is
//! killed ends at the same moment: [`Watch::missed`] looks a last time.

use std::{
    fs::File,
    io::{Read, Seek},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use libcgroups::common::write_cgroup_file_str;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::JoinHandle,
};

use super::{Cgroup, flat, text};
use crate::{
    error::{Error, Result},
    sys,
};

/// Watches until it is dropped.
pub struct Watch {
    task: JoinHandle<()>,
    counter: Counter,
    seen: Arc<AtomicU64>,
}

impl Watch {
    /// Calls `publish` for every event from now on.
    pub fn start(cgroup: &Cgroup, publish: impl Fn() + Send + 'static) -> Result<Self> {
        let directory = cgroup.required("memory")?.to_owned();
        let counter = match cgroup {
            Cgroup::V1(_) => Counter { directory: directory.clone(), file: "memory.oom_control" },
            Cgroup::V2(_) => Counter { directory: directory.clone(), file: "memory.events" },
        };
        let seen = Arc::new(AtomicU64::new(counter.kills()));
        let (count, known) = (counter.clone(), seen.clone());
        let task = match cgroup {
            Cgroup::V1(_) => {
                let events = register(&directory)?;
                tokio::spawn(async move {
                    while next_v1(&events).await.is_ok() && count.exists() {
                        known.store(count.kills(), Ordering::Relaxed);
                        publish();
                    }
                })
            }
            Cgroup::V2(_) => {
                let events = open_events(&directory)?;
                tokio::spawn(async move {
                    while next_v2(&events).await.is_ok() && count.exists() {
                        let kills = count.kills();
                        if kills > known.swap(kills, Ordering::Relaxed) {
                            publish();
                        }
                    }
                })
            }
        };
        Ok(Self { task, counter, seen })
    }

    /// Whether something was killed that was not published yet.
    pub fn missed(self) -> bool {
        self.counter.kills() > self.seen.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Processes that were killed so far.
#[derive(Clone)]
struct Counter {
    directory: PathBuf,
    file: &'static str,
}

impl Counter {
    fn kills(&self) -> u64 {
        let text = text(Some(&self.directory), self.file);
        flat(&text).get("oom_kill").copied().unwrap_or(0)
    }

    /// The removal of a group wakes its watchers as well.
    fn exists(&self) -> bool {
        self.directory.exists()
    }
}

fn register(directory: &Path) -> Result<AsyncFd<EventFd>> {
    let watch = || -> std::io::Result<_> {
        let events = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let control = File::open(directory.join("memory.oom_control"))?;
        let line = format!("{} {}", events.as_raw_fd(), control.as_raw_fd());
        write_cgroup_file_str(directory.join("cgroup.event_control"), &line)
            .map_err(std::io::Error::other)?;
        sys::watch(events, Interest::READABLE)
    };
    watch().map_err(Error::io(format!("watch OOM events of {}", directory.display())))
}

async fn next_v1(events: &AsyncFd<EventFd>) -> std::io::Result<()> {
    events.async_io(Interest::READABLE, |events| Ok(events.read().map(drop)?)).await
}

fn open_events(directory: &Path) -> Result<AsyncFd<File>> {
    let path = directory.join("memory.events");
    File::open(&path)
        .and_then(|file| sys::watch(file, Interest::PRIORITY))
        .map_err(Error::io(format!("watch OOM events in {}", path.display())))
}

async fn next_v2(events: &AsyncFd<File>) -> std::io::Result<()> {
    let mut ready = events.ready(Interest::PRIORITY).await?;
    // The kernel reports a change as long as it was not read.
    let mut file = events.get_ref();
    file.rewind()?;
    file.read_to_string(&mut String::new())?;
    ready.clear_ready();
    Ok(())
}
