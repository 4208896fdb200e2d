//! Drives the program `workload` (`bin/workload.rs`) in a container, by files
//! in its root file system: from the host, without starting anything there.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::{Node, eventually, until};

/// What it says; fields that a verb does not concern are zero.
#[derive(Debug, Clone, Deserialize)]
pub struct Answer {
    pub ok: bool,
    pub pages: u64,
    /// Pages that do not hold what they should (`verify`).
    pub bad: u64,
    pub first_bad: Option<u64>,
    /// Writes made whose version is forgotten (`verify`).
    pub lost_writes: u64,
    /// Pages written since the start.
    pub dirtied: u64,
    /// Pages that the threads have read in passing, and those found wrong.
    pub probed: u64,
    pub probed_bad: u64,
    /// The longest time between two reads of a thread.
    pub client: Gap,
    /// The longest gaps of the 100 µs ticker, longest first.
    pub ticker: Vec<Gap>,
}

/// A time in which it did not run, of CLOCK_REALTIME.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct Gap {
    pub start_ns: u64,
    pub gap_ns: u64,
}

impl Gap {
    pub fn length(self) -> Duration {
        Duration::from_nanos(self.gap_ns)
    }
}

impl Answer {
    /// The longest gap anybody saw.
    pub fn pause(&self) -> Gap {
        let ticker = self.ticker.first().copied().unwrap_or_default();
        if self.client.gap_ns > ticker.gap_ns { self.client } else { ticker }
    }
}

/// One that runs, with its memory filled.
pub struct Workload {
    dir: PathBuf,
}

impl Workload {
    /// Waits for the program whose pid is `pid` in `node`.
    pub fn at(node: &Node, pid: u32) -> Result<Self> {
        let dir = node.path(format!("/proc/{pid}/root/workload"));
        eventually("the workload to be ready", || {
            ensure!(dir.exists(), "no workload at {}", dir.display());
            Ok(dir.join("ready").exists())
        })?;
        Ok(Self { dir })
    }

    /// The one in a container of the node's containerd.
    pub fn of(node: &Node, container: &str) -> Result<Self> {
        Self::at(node, node.task_pid(container)?)
    }

    /// Its answer to a verb of `bin/workload.rs`. Not to be called while it
    /// moves: the question would stay at the source.
    pub fn ask(&self, verb: &str) -> Result<Answer> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let answer = self.dir.join(format!("answer-{number}"));
        // One of an earlier harness, carried along.
        let _ = fs::remove_file(&answer);
        put(&self.dir, &format!("{number} {verb}"))?;
        let text = until(&format!("the workload to answer {verb}"), || {
            Ok(answer.exists().then(|| fs::read(&answer)).transpose()?)
        })?;
        fs::remove_file(&answer)?;
        let answer: Answer = serde_json::from_slice(&text)
            .with_context(|| format!("read {:?}", String::from_utf8_lossy(&text)))?;
        ensure!(answer.ok, "the workload does not know {verb:?}, or a process of it is gone");
        Ok(answer)
    }

    /// Checks every page, and that no write was lost; how many pages.
    pub fn verify(&self) -> Result<u64> {
        let found = self.ask("verify")?;
        ensure!(
            found.bad == 0 && found.lost_writes == 0 && found.probed_bad == 0,
            "memory is damaged: {found:?}"
        );
        Ok(found.pages)
    }
}

fn put(dir: &Path, command: &str) -> Result<()> {
    let new = dir.join(".command");
    fs::write(&new, command)?;
    fs::rename(new, dir.join("command")).context("give the workload a command")
}
