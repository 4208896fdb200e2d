//! Memory that leaves beside CRIU's images: how it is watched while the
//! container runs, and how CRIU is kept from saving it once more.

use std::{io, sync::Arc};

use tracing::warn;
use transship_criu::{CriuError, Hidden, Hider, images::MemoryDir, pages};
use transship_memory::{ContainerMemory, Memory, SharedObjects, Tracker, Want};
use transship_migration::{MigrationError, chain};

use transship_types::PageSet;

use crate::{cgroup::Cgroup, container::Occupation, error::Error, tree};

/// The memory of one departing container. Dropped, nobody watches it any
/// more and CRIU sees it again.
pub struct Outbound {
    memory: Arc<dyn Memory>,
    /// The same, where shared objects are part of it.
    whole: Option<Arc<ContainerMemory>>,
    hider: Option<Hider>,
    hidden: Option<Hidden>,
}

impl Outbound {
    /// Everything slow, before the freeze; `criu_pid` is a CRIU that waits at
    /// an isolated gate. The error says why the memory must travel in CRIU's
    /// images.
    /// `shared`: CRIU can be kept from saving shared objects.
    pub async fn prepare(
        occupation: &Occupation,
        criu_pid: i32,
        shared: bool,
    ) -> Result<Self, String> {
        let cgroup = occupation.cgroup().map_err(|error| error.sentence())?.clone();
        let joined = tokio::task::spawn_blocking(move || {
            let hider = Hider::prepare(criu_pid).map_err(|error| chain(&error))?;
            let of_tracker = cgroup.clone();
            let tracker = Tracker::new(Box::new(move || pids(&of_tracker)), Want::Best)
                .map_err(|error| chain(&error))?;
            let mut memory: Arc<dyn Memory> = Arc::new(tracker);
            let mut whole = None;
            if shared {
                let objects = SharedObjects::new(Box::new(move || pids(&cgroup)))
                    .map_err(|error| chain(&error))?;
                let both = Arc::new(ContainerMemory::new(memory, objects));
                memory = both.clone();
                whole = Some(both);
            }
            Ok(Self { memory, whole, hider: Some(hider), hidden: None })
        });
        joined.await.map_err(|error| error.to_string())?
    }

    /// CRIU sees no pages.
    pub fn is_hidden(&self) -> bool {
        self.hidden.is_some()
    }

    /// The shared objects that the last scan has found, which go beside CRIU's
    /// images.
    pub fn shared(&self) -> Vec<(u64, u64)> {
        self.whole.as_ref().map(|memory| memory.shared()).unwrap_or_default()
    }

    pub fn memory(&self) -> Arc<dyn Memory> {
        self.memory.clone()
    }

    /// Nothing is watched any more. Whoever still holds the memory cannot
    /// keep it so.
    pub async fn end(self) {
        let ended = tokio::task::spawn_blocking(move || self.memory.disarm()).await;
        if let Err(error) = ended {
            warn!(%error, "the container's memory may still be watched");
        }
    }

    /// Every task stands still. Answers why CRIU sees their pages after all,
    /// if it does.
    pub async fn hide(&mut self, cgroup: &Cgroup) -> Result<Option<String>, MigrationError> {
        let Some(hider) = self.hider.take() else {
            return Ok(Some("its pages were hidden once already".into()));
        };
        let cgroup = cgroup.clone();
        let hiding = tokio::task::spawn_blocking(move || match pids(&cgroup) {
            Ok(pids) => Ok(hider.hide(&pids)),
            Err(error) => Err(error.to_string()),
        });
        match hiding.await {
            Ok(Ok(Ok(hidden))) => {
                self.hidden = Some(hidden);
                Ok(None)
            }
            Ok(Ok(Err(error @ CriuError::HalfHidden))) => {
                Err(MigrationError::runtime("freeze", chain(&error)))
            }
            Ok(Ok(Err(error))) => Ok(Some(chain(&error))),
            Ok(Err(error)) => Ok(Some(error)),
            Err(error) => Err(MigrationError::runtime("freeze", error.to_string())),
        }
    }
}

/// The guard regions of every process, by its id in the container. CRIU finds
/// them by what we hide from it.
pub async fn guards(cgroup: &Cgroup) -> Result<Vec<(u32, PageSet)>, MigrationError> {
    let cgroup = cgroup.clone();
    let found = tokio::task::spawn_blocking(move || {
        let mut found = Vec::new();
        for pid in pids(&cgroup).map_err(|error| error.to_string())? {
            // Gone, or without memory: CRIU restores no mapping of it either.
            let Some(vpid) = tree::inner_pid(pid) else { continue };
            match pages::guards(pid) {
                Ok(guards) if guards.is_empty() => {}
                Ok(guards) => found.push((vpid, guards)),
                Err(_) if tree::inner_pid(pid).is_none() => {}
                Err(error) => return Err(chain(&error)),
            }
        }
        Ok(found)
    });
    let found = found.await.map_err(|error| error.to_string());
    found.and_then(|found| found).map_err(|error| MigrationError::runtime("dump", error))
}

/// Puts them where CRIU would have put them.
pub async fn add_guards(
    images: Arc<MemoryDir>,
    guards: Vec<(u32, PageSet)>,
) -> Result<(), MigrationError> {
    if guards.is_empty() {
        return Ok(());
    }
    let added = tokio::task::spawn_blocking(move || {
        guards.iter().try_for_each(|(vpid, guards)| pages::add_guards(&images, *vpid, guards))
    });
    let added = added.await.map_err(|error| error.to_string());
    added
        .and_then(|added| added.map_err(|error| chain(&error)))
        .map_err(|error| MigrationError::runtime("dump", error))
}

/// By pid, as the kernel of this host numbers them.
fn pids(cgroup: &Cgroup) -> io::Result<Vec<i32>> {
    let pids = cgroup.pids().map_err(|error: Error| io::Error::other(error.sentence()))?;
    Ok(pids.into_iter().filter_map(|pid| i32::try_from(pid).ok()).collect())
}
