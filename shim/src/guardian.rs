//! Whoever is left when the shim is killed while it fills a container's
//! memory.
//!
//! A page that is missing reads as zeros as soon as the last descriptor of its
//! userfaultfd is closed, and the kernel closes those of a killed shim at
//! once, while the container runs on. So a child of the shim has copies of
//! them all. It does nothing, as long as the shim lives; faults of a container
//! whose shim is gone then wait, and do not pass, until the guardian has
//! killed it.
//!
//! The guardian is the shim's own program under another name, started before
//! the pause. It learns by packets on its standard input what it holds and
//! whom it would kill.

use std::{
    env,
    ffi::OsStr,
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{self, Child, Command, Stdio},
    time::Duration,
};

use nix::{
    cmsg_space,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
        sendmsg, socketpair,
    },
};
use tracing::warn;

use crate::{
    cgroup::Cgroup,
    error::{Error, Result},
    sys,
};

const NAME: &str = "transship-guardian";

/// Packets: this is one more descriptor; this is whom to kill, as JSON; all
/// pages are in place.
const HOLD: u8 = b'h';
const VICTIM: u8 = b'v';
const DONE: u8 = b'd';

/// A cgroup's paths and some more.
const PACKET: usize = 64 << 10;

/// Killed processes wait for nothing but the release of their memory.
const DEATH: Duration = Duration::from_secs(60);

/// When this process was started under the guardian's name it is one, and
/// this call does not return.
pub fn stand_guard_if_asked() {
    let name = env::args_os().next().unwrap_or_default();
    if Path::new(&name).file_name() != Some(OsStr::new(NAME)) {
        return;
    }
    process::exit(match stand_guard(io::stdin().as_fd()) {
        Ok(()) => 0,
        Err(_) => 1,
    });
}

/// Returns when nobody needs it any more, or nobody is left to kill.
fn stand_guard(shim: BorrowedFd<'_>) -> io::Result<()> {
    let mut held: Vec<OwnedFd> = Vec::new();
    let mut victim: Option<Cgroup> = None;
    loop {
        // An error is the end as well: there is nobody to tell it to.
        let (packet, descriptors) = receive(shim).unwrap_or_default();
        match packet.split_first() {
            Some((&HOLD, _)) => held.extend(descriptors),
            Some((&VICTIM, json)) => victim = serde_json::from_slice(json).ok(),
            Some((&DONE, _)) => return Ok(()),
            _ => break,
        }
    }
    let killed = victim.map_or(Ok(()), |cgroup| cgroup.kill(DEATH));
    // Only now that nobody can read them.
    drop(held);
    killed.map_err(|error| io::Error::other(error.sentence()))
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; PACKET];
    let mut space = cmsg_space!([RawFd; 1]);
    let mut descriptors = Vec::new();
    let length = {
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), flags)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                descriptors.extend(received.into_iter().map(sys::own));
            }
        }
        message.bytes
    };
    bytes.truncate(length);
    Ok((bytes, descriptors))
}

/// A guardian at work; dropped without [`dismiss`](Self::dismiss) it kills.
pub struct Guardian {
    /// None once it was dismissed.
    socket: Option<OwnedFd>,
    child: Child,
}

impl Guardian {
    pub fn post() -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|errno| Error::io("connect to a guardian")(errno.into()))?;
        // Not our path but our program, also when an upgrade has replaced it.
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).env_clear().current_dir("/");
        command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null());
        // What is sent to the shim's process group is not meant for it.
        command.process_group(0);
        let child = command.spawn().map_err(Error::io("start a guardian"))?;
        Ok(Self { socket: Some(ours), child })
    }

    /// The guardian has this descriptor as well.
    pub fn hold(&self, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        self.send(&[HOLD], Some(descriptor))
    }

    /// Whom it is to kill if this process dies.
    pub fn over(&self, victim: &Cgroup) -> io::Result<()> {
        let mut packet = vec![VICTIM];
        serde_json::to_writer(&mut packet, victim)?;
        self.send(&packet, None)
    }

    /// Nobody needs it any more. Blocks until it has gone.
    pub fn dismiss(self) {
        if let Err(error) = self.send(&[DONE], None) {
            warn!(%error, "a guardian was gone before it was dismissed");
        }
    }

    fn send(&self, packet: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        match &self.socket {
            Some(socket) => send(socket, packet, descriptor),
            None => Ok(()),
        }
    }
}

fn send(socket: &OwnedFd, packet: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let bytes = [IoSlice::new(packet)];
    sendmsg::<()>(socket.as_raw_fd(), &bytes, control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

impl Drop for Guardian {
    fn drop(&mut self) {
        self.socket = None;
        if let Err(error) = self.child.wait() {
            warn!(%error, "a guardian's end was not seen");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, thread};

    use super::*;
    use crate::cgroup::scratch::Scratch;

    /// A guardian in a thread over a sleeper, with one descriptor: the answer
    /// is whether the sleeper lived on until that was closed.
    fn spared(ending: impl FnOnce(&OwnedFd)) -> Option<bool> {
        let mut group = Scratch::create("guardian", &["freezer", "pids"], "exec sleep 600")?;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        let guard = thread::spawn(move || stand_guard(theirs.as_fd()));
        let (mut read, write) = io::pipe().unwrap();
        send(&ours, &[HOLD], Some(write.as_fd())).unwrap();
        drop(write);
        let victim = [&[VICTIM], serde_json::to_vec(&group.cgroup).unwrap().as_slice()].concat();
        send(&ours, &victim, None).unwrap();
        ending(&ours);
        drop(ours);
        // The end of the pipe is the end of the guardian's descriptor.
        assert_eq!(read.read(&mut [0]).unwrap(), 0);
        let lives = group.child.try_wait().unwrap().is_none();
        guard.join().unwrap().unwrap();
        Some(lives)
    }

    #[test]
    fn it_kills_before_it_lets_go() {
        assert_ne!(spared(|_| ()), Some(true));
    }

    #[test]
    fn once_dismissed_it_lets_everybody_live() {
        assert_ne!(spared(|shim| send(shim, &[DONE], None).unwrap()), Some(false));
    }
}
