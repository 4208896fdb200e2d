//! What CRIU's restore says on `lazy-pages.socket`: for each task its pid
//! (negative, and alone, if it is a zombie), then one byte with its
//! userfaultfd; at the end a number that is no pid.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockopt,
            listen as listen_on, socket, sockopt::PeerCredentials,
        },
        stat::{Mode, fchmod},
    },
    unistd::geteuid,
};
use transship_types::{PageSet, Space};

use super::{Shared, nonblocking, task::Task};
use crate::{
    MemoryError,
    sys::{socket::receive_descriptor, uffd::Userfaultfd},
};

const FINISHED: i32 = 0x5253_5446;

/// A socket of this name for root alone; the directory's path may be longer
/// than a socket's address.
pub(super) fn listen(dir: &Path, name: &str) -> io::Result<UnixListener> {
    match fs::remove_file(dir.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let dir = File::open(dir)?;
    let kind = SockType::Stream;
    let listener = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    // Before it is bound, so that it never has another.
    fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let path = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
    bind(listener.as_raw_fd(), &UnixAddr::new(path.as_str())?)?;
    listen_on(&listener, Backlog::new(1)?)?;
    Ok(listener.into())
}

/// Takes what CRIU's one connection brings, up to its end.
pub(super) fn attend(shared: &Arc<Shared>, listener: &UnixListener, lazy: &HashMap<u32, PageSet>) {
    match tasks(shared, listener, lazy) {
        Ok(true) => finished(shared),
        Ok(false) => {}
        Err(source) => {
            shared.fail(MemoryError::System { what: "taking over CRIU's lazy pages", source });
        }
    }
}

/// Answers false if it was told to stop.
fn tasks(
    shared: &Shared,
    listener: &UnixListener,
    lazy: &HashMap<u32, PageSet>,
) -> io::Result<bool> {
    let Some(mut criu) = criu(shared, listener)? else { return Ok(false) };
    loop {
        let Some(pid) = number(shared, &mut criu)? else { return Ok(false) };
        if pid == FINISHED {
            return Ok(true);
        }
        let Ok(pid) = u32::try_from(pid) else { continue };
        if !readable(shared, &criu)? {
            return Ok(false);
        }
        let uffd = receive_descriptor(&criu)?;
        nonblocking(&uffd)?;
        let id = shared.next_id.fetch_add(1, Relaxed);
        let pages = lazy.get(&pid).cloned().unwrap_or_default();
        shared.add(Task::restored(id, Space::Process(pid), &pages, Userfaultfd::from(uffd)))?;
    }
}

/// CRIU's connection. It runs as we do; whoever does not got here by a mode
/// that somebody has changed, and must not hand us a userfaultfd.
fn criu(shared: &Shared, listener: &UnixListener) -> io::Result<Option<UnixStream>> {
    while readable(shared, listener)? {
        let (stream, _) = listener.accept()?;
        let peer = getsockopt(&stream, PeerCredentials)?;
        if may_serve(peer.uid()) {
            return Ok(Some(stream));
        }
        tracing::warn!(pid = peer.pid(), uid = peer.uid(), "refused at the lazy-pages socket");
    }
    Ok(None)
}

fn may_serve(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

fn number(shared: &Shared, criu: &mut UnixStream) -> io::Result<Option<i32>> {
    let mut bytes = [0; 4];
    if !readable(shared, criu)? {
        return Ok(None);
    }
    // Written at once, so that the rest is there when the first byte is.
    criu.read_exact(&mut bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            io::Error::new(error.kind(), "CRIU left before its restore was finished")
        }
        _ => error,
    })?;
    Ok(Some(i32::from_ne_bytes(bytes)))
}

/// Waits for something to read; false if it is time to end.
fn readable(shared: &Shared, socket: &impl AsFd) -> io::Result<bool> {
    let mut fds = [
        PollFd::new(socket.as_fd(), PollFlags::POLLIN),
        PollFd::new(shared.ending.as_fd(), PollFlags::POLLIN),
    ];
    while let Err(errno) = poll(&mut fds, PollTimeout::NONE) {
        if errno != nix::errno::Errno::EINTR {
            return Err(errno.into());
        }
    }
    Ok(!fds[1].any().unwrap_or(true))
}

/// All tasks stand before their first instruction, their memory registered.
fn finished(shared: &Shared) {
    let tasks: Vec<_> = super::lock(&shared.tasks).values().cloned().collect();
    let mut hot: Vec<_> = Vec::new();
    for task in &tasks {
        let rounds = shared.store.rounds(task.space());
        let first = rounds.iter().map(|(_, round)| *round).min();
        let later = rounds.into_iter().filter(|(_, round)| Some(*round) != first);
        hot.extend(later.map(|(range, round)| (std::cmp::Reverse(round), task.id, range)));
    }
    hot.sort_unstable();
    {
        let mut state = shared.state();
        state.hot = hot.into_iter().map(|(_, task, range)| (task, range)).collect();
        state.finished = Some(Instant::now());
    }
    for task in &tasks {
        if let Err(error) = shared.close_if_filled(task) {
            return shared.fail(error);
        }
    }
    shared.complete_if_done();
    shared.changed.notify_all();
}
