//! Collects the processes that end.
//!
//! The shim is a child subreaper: the first process of a container and every
//! `exec` become its children once the OCI runtime has left. Their exits are
//! wanted by pid, and a pid is often known only after the process has ended.
//! Processes that other code started (the runtime itself, a log driver) are
//! waited for by whoever started them, so nothing here may wait for "any
//! child" at once: a child nobody asked for is left alone for [`GRACE`], and
//! its status is remembered afterwards.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use nix::{
    errno::Errno,
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    unistd::Pid,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    time::sleep,
};
use tracing::warn;

use crate::error::{Error, Result};

/// How long a child that nobody asked for stays a zombie. Long enough for its
/// starter to wait for it, or for the OCI runtime to write its pid file.
const GRACE: Duration = Duration::from_secs(5);
/// Remembered exits of such children; each is needed within one Start.
const REMEMBERED: usize = 128;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 + the signal.
    pub status: u32,
    pub at: SystemTime,
}

impl Exit {
    pub fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }
}

/// Status of a process whose end was seen by somebody else.
const UNKNOWN_STATUS: u32 = 255;

#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    watched: HashMap<i32, oneshot::Sender<Exit>>,
    strangers: HashMap<i32, Instant>,
    remembered: VecDeque<(i32, Exit)>,
}

impl Reaper {
    /// Starts to collect. Must run inside the runtime that serves the shim.
    pub fn start() -> Result<Self> {
        let reaper = Self::default();
        let mut signals = signal(SignalKind::child()).map_err(Error::io("subscribe to SIGCHLD"))?;
        let table = reaper.clone();
        tokio::spawn(async move {
            loop {
                let next = table.table().collect();
                match next {
                    Some(wait) => tokio::select! {
                        _ = signals.recv() => {}
                        () = sleep(wait) => {}
                    },
                    None => {
                        signals.recv().await;
                    }
                }
            }
        });
        Ok(reaper)
    }

    /// Resolves when `pid`, a child of this process, has ended; at once if it
    /// has ended before.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.table();
        table.strangers.remove(&pid);
        let known = table.remembered.iter().position(|(known, _)| *known == pid);
        if let Some((_, exit)) = known.and_then(|at| table.remembered.remove(at)) {
            let _ = sender.send(exit);
            return receiver;
        }
        table.watched.insert(pid, sender);
        table.try_reap(pid);
        receiver
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Reaps whatever may be reaped now. Some: look again after so long.
    fn collect(&mut self) -> Option<Duration> {
        let watched: Vec<i32> = self.watched.keys().copied().collect();
        for pid in watched {
            self.try_reap(pid);
        }
        loop {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            let pid = match waitid(Id::All, flags) {
                Ok(status) => status.pid()?.as_raw(),
                Err(Errno::EINTR) => continue,
                Err(_) => {
                    self.strangers.clear();
                    return None;
                }
            };
            if self.watched.contains_key(&pid) {
                self.try_reap(pid);
                continue;
            }
            let since = *self.strangers.entry(pid).or_insert_with(Instant::now);
            if let Some(left) = GRACE.checked_sub(since.elapsed()).filter(|left| !left.is_zero()) {
                return Some(left);
            }
            self.strangers.remove(&pid);
            if let Some(exit) = reap(pid) {
                if self.remembered.len() == REMEMBERED {
                    self.remembered.pop_front();
                }
                self.remembered.push_back((pid, exit));
            }
        }
    }

    fn try_reap(&mut self, pid: i32) {
        if let Some(exit) = reap(pid)
            && let Some(sender) = self.watched.remove(&pid)
        {
            // The receiver is gone only when its container is.
            let _ = sender.send(exit);
        }
    }
}

fn reap(pid: i32) -> Option<Exit> {
    match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, code)) => Some(Exit::now(code as u32)),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(Exit::now(128 + signal as u32)),
        Ok(_) | Err(Errno::EINTR) => None,
        Err(errno) => {
            warn!(pid, %errno, "a watched process is no child of this shim; its status is lost");
            Some(Exit::now(UNKNOWN_STATUS))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[expect(clippy::zombie_processes, reason = "the reaper waits, that is the test")]
    #[tokio::test]
    async fn an_exit_is_seen_before_and_after_it_is_asked_for() {
        let reaper = Reaper::start().unwrap();
        let early = Command::new("/bin/sh").args(["-c", "exit 3"]).spawn().unwrap();
        // Still there to be asked for, however late: it stays a zombie.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(Pid::from_raw(early.id() as i32)), flags).unwrap();
        tokio::task::yield_now().await;
        assert_eq!(reaper.watch(early.id() as i32).await.unwrap().status, 3);

        let mut late = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let exit = reaper.watch(late.id() as i32);
        late.kill().unwrap();
        assert_eq!(exit.await.unwrap().status, 128 + 9);
    }

    #[tokio::test]
    async fn a_child_of_other_code_is_left_to_it() {
        let _reaper = Reaper::start().unwrap();
        let status = tokio::process::Command::new("/bin/sh").args(["-c", "exit 4"]).status().await;
        assert_eq!(status.unwrap().code(), Some(4));
    }
}
