//! Every program that this process and its descendants start, with the time:
//! the kernel's process events connector (`linux/cn_proc.h`). It tells of the
//! whole host; forks tell whose each process is.

use std::{
    collections::HashSet,
    fs,
    os::fd::OwnedFd,
    process,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind,
    netlink::{self, SocketAddrNetlink},
    recv, send, socket_with, sockopt,
};

use super::now;

/// The group of the connector for process events, and the id of its messages.
const CN_IDX_PROC: u32 = 1;
const CN_VAL_PROC: u32 = 1;
const PROC_CN_MCAST_LISTEN: u32 = 1;
const NLMSG_DONE: u16 = 3;
/// Bytes of `nlmsghdr` and `cn_msg`.
const HEADERS: usize = 16 + 20;

const FORK: u32 = 1;
const EXEC: u32 = 2;

/// Some thousand events; a busy host has hundreds in a second.
const BUFFER: usize = 4 << 20;

/// Events come at once. One that has not come after this long never will.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone)]
pub struct Exec {
    /// As [`now`](super::now) counts.
    pub at_ns: u64,
    pub pid: u32,
    /// Empty if the process was gone before we could look.
    pub command: String,
}

#[derive(Default)]
struct Seen {
    family: HashSet<u32>,
    execs: Vec<Exec>,
    /// Time of the last event of anybody.
    until_ns: u64,
    failed: Option<String>,
    /// From the clock of the events, CLOCK_MONOTONIC, to ours.
    offset_ns: u64,
}

/// Watches from its start on, to be started before what it is to watch.
pub struct Watch(Arc<(Mutex<Seen>, Condvar)>);

impl Watch {
    pub fn start() -> Result<Self> {
        let socket = listen().context("listen to the kernel's process events")?;
        let family = HashSet::from([process::id()]);
        let monotonic = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        let offset_ns = now()?.saturating_sub(monotonic.as_nanos() as u64);
        let seen = Seen { family, offset_ns, ..Seen::default() };
        let seen = Arc::new((Mutex::new(seen), Condvar::new()));
        let ours = Arc::clone(&seen);
        thread::spawn(move || {
            let mut message = [0; 1024];
            loop {
                let got = recv(&socket, &mut message[..], RecvFlags::empty());
                let (lock, news) = &*ours;
                let mut seen = lock.lock().unwrap_or_else(PoisonError::into_inner);
                match got {
                    Ok((read, _)) => seen.note(&message[..read]),
                    Err(error) if error == rustix::io::Errno::INTR => {}
                    // ENOBUFS among them: events were lost, counts would be wrong.
                    Err(error) => seen.failed = Some(error.to_string()),
                }
                news.notify_all();
                if seen.failed.is_some() {
                    return;
                }
            }
        });
        Ok(Self(seen))
    }

    /// Commands of those started between two times.
    pub fn between(&self, from_ns: u64, to_ns: u64) -> Result<Vec<String>> {
        let execs = self.since(from_ns, to_ns)?;
        Ok(execs.into_iter().filter(|exec| exec.at_ns <= to_ns).map(|exec| exec.command).collect())
    }

    /// Those started since `from_ns`, once all until `to_ns` are known.
    pub fn since(&self, from_ns: u64, to_ns: u64) -> Result<Vec<Exec>> {
        // An event of our own, later than all that are asked for.
        process::Command::new("true").status().context("run true")?;
        let (lock, news) = &*self.0;
        let seen = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = |seen: &mut Seen| seen.until_ns < to_ns && seen.failed.is_none();
        let (seen, _) = news
            .wait_timeout_while(seen, PATIENCE, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(seen.failed.is_none(), "the kernel's process events: {:?}", seen.failed);
        ensure!(seen.until_ns >= to_ns, "the kernel tells of no processes");
        Ok(seen.execs.iter().filter(|exec| exec.at_ns >= from_ns).cloned().collect())
    }
}

impl Seen {
    /// `struct proc_event`: what, cpu, time, and for forks the pids and
    /// thread groups of both, for execs those of one.
    fn note(&mut self, message: &[u8]) {
        let Some(event) = message.get(HEADERS..) else { return };
        let word = |at: usize| {
            let bytes = event.get(at..at + 4)?;
            Some(u32::from_ne_bytes(bytes.try_into().ok()?))
        };
        let time = event.get(8..16).and_then(|bytes| bytes.try_into().ok());
        let (Some(what), Some(at_ns)) = (word(0), time.map(u64::from_ne_bytes)) else { return };
        let at_ns = at_ns + self.offset_ns;
        self.until_ns = self.until_ns.max(at_ns);
        match what {
            FORK => {
                let (Some(parent), Some(child)) = (word(20), word(28)) else { return };
                if self.family.contains(&parent) {
                    self.family.insert(child);
                }
            }
            EXEC => {
                let Some(pid) = word(20) else { return };
                if self.family.contains(&pid) {
                    self.execs.push(Exec { at_ns, pid, command: command(pid) });
                }
            }
            _ => {}
        }
    }
}

fn command(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = bytes.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    words.join(" ").trim_end().to_owned()
}

fn listen() -> Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(netlink::CONNECTOR),
    )?;
    // Beyond the host's limit, where that is allowed.
    let _ = sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(&socket, BUFFER));
    bind(&socket, &SocketAddrNetlink::new(0, CN_IDX_PROC))?;
    let length = HEADERS + 4;
    let mut request = Vec::with_capacity(length);
    request.extend((length as u32).to_ne_bytes());
    request.extend(NLMSG_DONE.to_ne_bytes());
    request.extend([0; 2 + 4 + 4]); // flags, sequence, port
    request.extend(CN_IDX_PROC.to_ne_bytes());
    request.extend(CN_VAL_PROC.to_ne_bytes());
    request.extend([0; 4 + 4]); // sequence, acknowledgement
    request.extend(4u16.to_ne_bytes());
    request.extend([0; 2]); // flags
    request.extend(PROC_CN_MCAST_LISTEN.to_ne_bytes());
    send(&socket, &request, SendFlags::empty())?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grandchildren_are_seen_with_their_command() -> Result<()> {
        let watch = Watch::start()?;
        let before = now()?;
        let from = now()?;
        process::Command::new("sh").args(["-c", "sleep 0.02; true"]).status()?;
        let to = now()?;
        let seen = watch.between(from, to)?;
        assert!(seen.iter().any(|command| command == "sleep 0.02"), "{seen:?}");
        assert_eq!(watch.between(before, from)?, Vec::<String>::new());
        Ok(())
    }
}
