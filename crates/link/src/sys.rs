//! Socket options and descriptors in messages: what std and tokio lack.
#![allow(unsafe_code)]

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg, setsockopt,
    sockopt::{KeepAlive, TcpKeepCount, TcpKeepIdle, TcpKeepInterval, TcpNoDelay, TcpUserTimeout},
};

/// A peer that vanished is noticed after about 20 s, idle or not: long enough
/// for a link that flaps, short enough for a container that stands still.
pub fn tune(socket: &impl AsFd) -> io::Result<()> {
    setsockopt(socket, TcpNoDelay, &true)?;
    setsockopt(socket, KeepAlive, &true)?;
    setsockopt(socket, TcpKeepIdle, &10)?;
    setsockopt(socket, TcpKeepInterval, &3)?;
    setsockopt(socket, TcpKeepCount, &3)?;
    // Milliseconds; the same for bytes that are not acknowledged.
    setsockopt(socket, TcpUserTimeout, &20_000)?;
    Ok(())
}

/// Sends `bytes` (all of them, or fails) with a copy of `descriptor`.
pub fn send_with(
    socket: &impl AsRawFd,
    bytes: &[u8],
    descriptor: Option<&impl AsRawFd>,
) -> io::Result<usize> {
    let raw = descriptor.map(|d| [d.as_raw_fd()]);
    let control: Vec<_> = raw.iter().map(|fds| ControlMessage::ScmRights(fds)).collect();
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    Ok(sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &control, flags, None)?)
}

/// Receives bytes and at most one descriptor; more than one is an error (the
/// kernel closes those that find no room).
pub fn receive_with(
    socket: &impl AsRawFd,
    bytes: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                // SAFETY: the kernel has just made this descriptor for us by
                // SCM_RIGHTS, nix hands out its bare number once, and nobody
                // else in this process can know it: we are its only owner.
                received.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    let truncated = message.flags.contains(MsgFlags::MSG_CTRUNC);
    if truncated || received.len() > 1 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more than one descriptor"));
    }
    Ok((message.bytes, received.pop()))
}

/// As many groups as most processes have; more are asked for if need be.
const GROUPS: usize = 32;

/// The supplementary groups of who made the other end of a local socket.
pub fn peer_groups(socket: &impl AsFd) -> io::Result<Vec<u32>> {
    let fd = socket.as_fd().as_raw_fd();
    let mut groups = vec![0u32; GROUPS];
    loop {
        let room = size_of::<u32>() * groups.len();
        let mut length = nix::libc::socklen_t::try_from(room)
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: `groups` has room for `length` bytes of gid_t, which is u32
        // (asserted below), and both outlive the call. The kernel writes no
        // more than `length` says and then says how much it wrote, or, with
        // ERANGE, how much it would have.
        let asked = unsafe {
            nix::libc::getsockopt(
                fd,
                nix::libc::SOL_SOCKET,
                nix::libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &mut length,
            )
        };
        let there = length as usize / size_of::<u32>();
        if asked == 0 {
            groups.truncate(there);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(nix::libc::ERANGE) || there <= groups.len() {
            return Err(error);
        }
        groups.resize(there, 0);
    }
}

const _: () = assert!(size_of::<nix::libc::gid_t>() == size_of::<u32>());
