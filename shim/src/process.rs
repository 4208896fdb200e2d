//! One process that the shim answers for: a container's first, or an exec.

use tokio::sync::oneshot;

use crate::{
    container::Reply,
    error::{Error, Result},
    reaper::Exit,
    stdio::{Live, Urls},
};

/// ```text
/// Added ──start──▶ Starting ──▶ Running ──exit──▶ Stopped
///   ▲                 │ failed
///   └─────────────────┘ (first process; a failed exec is Stopped)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Added,
    Starting,
    Running,
    Stopped,
}

pub struct Process {
    pub stage: Stage,
    pub urls: Urls,
    /// 0 as long as there is none.
    pub pid: i32,
    pub live: Option<Live>,
    pub exit: Option<Exit>,
    waiters: Vec<Reply<Exit>>,
}

impl Process {
    pub fn new(urls: Urls) -> Self {
        Self { stage: Stage::Added, urls, pid: 0, live: None, exit: None, waiters: Vec::new() }
    }

    /// Answers once the process has ended.
    pub fn wait(&mut self, reply: Reply<Exit>) {
        match self.exit {
            Some(exit) => drop(reply.send(Ok(exit))),
            None => self.waiters.push(reply),
        }
    }

    pub fn end(&mut self, exit: Exit) {
        self.stage = Stage::Stopped;
        self.exit = Some(exit);
        for waiter in self.waiters.drain(..) {
            // A client that has hung up does not mind.
            let _ = waiter.send(Ok(exit));
        }
    }

    /// Tells a signal to a process that is ours to reap: its pid cannot have
    /// gone to another one.
    pub fn signal(&self, signal: u32) -> Result<()> {
        if self.exit.is_some() {
            return Err(Error::NotFound("process already finished".into()));
        }
        if self.pid == 0 {
            return Err(Error::FailedPrecondition("process is not started yet".into()));
        }
        crate::sys::send_signal(self.pid, signal).map_err(|error| {
            if error.raw_os_error() == Some(nix::libc::ESRCH) {
                Error::NotFound("process already finished".into())
            } else {
                Error::io(format!("send signal {signal} to process {}", self.pid))(error)
            }
        })
    }
}

/// A reply whose asker may have gone.
pub fn answer<T>(reply: oneshot::Sender<Result<T>>, value: Result<T>) {
    let _ = reply.send(value);
}
