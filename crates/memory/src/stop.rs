//! Stopping threads of other processes, for a moment and without a trace.
//!
//! Everything here happens on one thread of ours that ends soon: the kernel
//! then detaches whatever is still attached, also a thread that would not
//! stop in time.

use std::{
    collections::HashSet,
    fs, io, thread,
    time::{Duration, Instant},
};

use thiserror::Error;

use crate::{
    maps,
    sys::ptrace::{self, Stop},
};

/// How long a thread may take to stop. One that runs or sleeps needs
/// microseconds, on a machine with too much to do some milliseconds; the
/// parent of a vfork, or a thread in a frozen cgroup, does not stop at all.
const STOP_WITHIN: Duration = Duration::from_millis(100);
/// The same for a thread that is known to be in such a state.
const STOP_WITHIN_IF_ASLEEP: Duration = Duration::from_millis(5);
/// How long the question "has it stopped" is asked without a pause. Most stop
/// within this, and each pause would make theirs longer.
const SPIN: Duration = Duration::from_micros(200);
const PAUSE: Duration = Duration::from_micros(50);
/// Times the list of threads is read until it names no new one.
const LISTINGS: usize = 10;

/// Why a process cannot be watched, for now or for good.
#[derive(Debug, Error)]
pub(crate) enum Refused {
    #[error("it has ended")]
    Gone,
    #[error("none of its threads stopped in time")]
    Busy,
    #[error("{0}")]
    Unsupported(&'static str),
    #[error("it cannot be traced: {0}")]
    Untraceable(io::Error),
    #[error("a userfaultfd cannot be made in it: {0}")]
    Call(io::Error),
    #[error("{what}: {source}")]
    System { what: &'static str, source: io::Error },
}

pub(crate) fn system(what: &'static str) -> impl Fn(io::Error) -> Refused {
    move |source| match source {
        gone if maps::gone(&gone) => Refused::Gone,
        source => Refused::System { what, source },
    }
}

/// Calls `act` while every thread of a process stands still.
pub(crate) fn all_threads<T: Send>(
    pid: i32,
    act: impl FnOnce() -> T + Send,
) -> Result<(T, Duration), Refused> {
    thread::scope(|scope| {
        let held = scope.spawn(|| {
            let mut stopped = HashSet::new();
            let begin = Instant::now();
            for _ in 0..LISTINGS {
                let all = threads(pid, usize::MAX)?;
                let new: Vec<_> =
                    all.into_iter().filter(|(tid, _)| !stopped.contains(tid)).collect();
                if new.is_empty() {
                    let done = act();
                    stopped.iter().for_each(|&tid| detach(tid));
                    return Ok((done, begin.elapsed()));
                }
                for (tid, patience) in new {
                    match seize(pid, tid).and_then(|()| trap(pid, tid, patience)) {
                        Ok(()) => _ = stopped.insert(tid),
                        Err(Refused::Gone) => {}
                        Err(refused) => return Err(refused),
                    }
                }
            }
            Err(Refused::Busy)
        });
        held.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Some threads of a process, if possible `enough` of them, with the time each
/// may take to stop; those that should stop soonest first.
pub(crate) fn threads(pid: i32, enough: usize) -> Result<Vec<(i32, Duration)>, Refused> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).map_err(system("listing its threads"))?;
    let mut threads = Vec::new();
    for task in tasks.flatten() {
        let Some(tid) = task.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        match state(pid, tid) {
            None | Some(b'Z' | b'X') => {}
            Some(b'D') => threads.push((tid, STOP_WITHIN_IF_ASLEEP)),
            Some(_) => threads.push((tid, STOP_WITHIN)),
        }
        // A program may have thousands.
        if threads.len() >= enough && threads.iter().any(|(_, patience)| *patience == STOP_WITHIN) {
            break;
        }
    }
    threads.sort_by_key(|&(tid, patience)| (std::cmp::Reverse(patience), tid));
    if threads.is_empty() { Err(Refused::Gone) } else { Ok(threads) }
}

/// The letter of proc_pid_stat(5).
pub(crate) fn state(pid: i32, tid: i32) -> Option<u8> {
    let stat = fs::read(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    let name_ends = stat.iter().rposition(|&byte| byte == b')')?;
    stat.get(name_ends + 2).copied()
}

pub(crate) fn detach(tid: i32) {
    if let Err(error) = ptrace::detach(tid) {
        // The end of this thread does the same.
        tracing::debug!(tid, %error, "a thread was not let go at once");
    }
}

/// Attaches, if possible without the thread's system call filters: they may
/// forbid userfaultfd, and some kill whoever tries.
pub(crate) fn seize(pid: i32, tid: i32) -> Result<(), Refused> {
    let unfiltered = match ptrace::seize(tid, true) {
        Err(error) if !maps::gone(&error) => error,
        done => return done.map_err(|_| Refused::Gone),
    };
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status"));
    let filtered = status
        .map_err(system("reading its status"))?
        .lines()
        .filter_map(|line| line.strip_prefix("Seccomp:"))
        .any(|mode| mode.trim() != "0");
    if filtered {
        return Err(Refused::Untraceable(unfiltered));
    }
    ptrace::seize(tid, false).map_err(Refused::Untraceable)
}

/// Stops the thread where it does nothing on behalf of a signal.
pub(crate) fn trap(pid: i32, tid: i32, patience: Duration) -> Result<(), Refused> {
    loop {
        ptrace::interrupt(tid).map_err(|_| Refused::Gone)?;
        match wait(pid, tid, patience)? {
            Some(Stop::Trap) => return Ok(()),
            // It came first, and is the thread's to handle. The interruption
            // asked for now happens right after.
            Some(Stop::Signal(signal)) => {
                ptrace::interrupt(tid).map_err(|_| Refused::Gone)?;
                ptrace::resume(tid, signal).map_err(|_| Refused::Gone)?;
            }
            Some(Stop::SystemCall) => ptrace::resume(tid, 0).map_err(|_| Refused::Gone)?,
            None => return Err(Refused::Busy),
        }
    }
}

/// Why the thread has stopped; None if it has not within `patience`.
pub(crate) fn wait(pid: i32, tid: i32, patience: Duration) -> Result<Option<Stop>, Refused> {
    let begin = Instant::now();
    loop {
        if let Some(stop) = ptrace::stop(tid).map_err(Refused::Untraceable)? {
            return Ok(Some(stop));
        }
        let waited = begin.elapsed();
        if waited < SPIN {
            thread::yield_now();
            continue;
        }
        if matches!(state(pid, tid), None | Some(b'Z' | b'X')) {
            return Err(Refused::Gone);
        }
        if waited > patience {
            return Ok(None);
        }
        thread::sleep(PAUSE);
    }
}
