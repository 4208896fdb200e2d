//! Every system call of this crate that needs `unsafe`, and the thin wrappers
//! that go with them.

use std::{
    ffi::CStr,
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
    path::Path,
};

use nix::{
    cmsg_space, libc,
    sys::{
        socket::{
            AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag,
            SockType, UnixAddr, accept4, bind, connect, getsockopt, listen, recv, recvmsg, sendmsg,
            socket, socketpair, sockopt,
        },
        stat::{Mode, fchmod},
    },
};

use tokio::io::unix::AsyncFd;

use crate::packet::Packet;

mod bpf;
mod hide;
mod sample;
mod scan;
pub use bpf::{iterate, load_iterator};
pub use hide::{
    EmptyProcess, bind_mount, join_mount_namespace, join_network_namespace, mount_tmpfs,
    own_mount_namespace, unmount,
};
pub use sample::{Sample, Wish};
pub use scan::scan_guards;

/// The kernel's SCM_MAX_FD: with room for that many none is ever cut off.
const MAX_DESCRIPTORS: usize = 253;

pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

pub fn listener(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket()?;
    // Before it is bound, so that it never has another.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(16)?)?;
    Ok(socket)
}

pub fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

fn seqpacket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Answers EAGAIN if nobody waits, whatever the socket's own flags say.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut poll = [nix::poll::PollFd::new(listener, nix::poll::PollFlags::POLLIN)];
    if nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO)? == 0 {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// For tokio's event loop. Every call on it says MSG_DONTWAIT for itself, so
/// the socket's own flags, which its other holders may share, stay untouched.
pub fn watch(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, and stays the same one until it is dropped.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

pub fn peer(socket: BorrowedFd<'_>) -> io::Result<(i32, u32)> {
    let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
    Ok((credentials.pid(), credentials.uid()))
}

/// One packet; `None` when the other end is closed. A packet above `limit`
/// is refused before memory is taken for it.
pub fn receive(socket: BorrowedFd<'_>, limit: usize, wait: bool) -> io::Result<Option<Packet>> {
    let wait = if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
    let peek = wait | MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
    let length = recv(socket.as_raw_fd(), &mut [], peek)?;
    if length == 0 {
        return Ok(None);
    }
    if length > limit {
        let text = format!("a packet of {length} bytes is above the limit of {limit}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut bytes = vec![0; length];
    let mut space = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut descriptors = Vec::new();
    {
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let flags = wait | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), flags)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                for fd in received {
                    // SAFETY: SCM_RIGHTS has just installed it in our table,
                    // and nothing else knows its number.
                    descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
    }
    Ok(Some(Packet { bytes, descriptors }))
}

pub fn send(socket: BorrowedFd<'_>, packet: &Packet, wait: bool) -> io::Result<()> {
    let raw: Vec<RawFd> = packet.descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let mut flags = MsgFlags::MSG_NOSIGNAL;
    if !wait {
        flags |= MsgFlags::MSG_DONTWAIT;
    }
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&packet.bytes)], control, flags, None)?;
    Ok(())
}

/// A descriptor that this process was started with, by its number.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    let flags = fcntl(number, libc::F_GETFD, 0)?;
    debug_assert!(flags >= 0);
    // SAFETY: it is open (just asked), and this single-threaded process has
    // nothing else that owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A copy of `number`, at `above` or higher, which survives an exec.
pub fn copy_above(number: RawFd, above: RawFd) -> io::Result<RawFd> {
    fcntl(number, libc::F_DUPFD, above)
}

/// Puts `from` under `number`, whatever was there; it survives an exec.
pub fn place(from: OwnedFd, number: RawFd) -> io::Result<()> {
    if from.as_raw_fd() == number {
        fcntl(from.into_raw_fd(), libc::F_SETFD, 0)?;
        return Ok(());
    }
    // SAFETY: dup2 touches no memory; the caller gives up what `number` was.
    let done = unsafe { libc::dup2(from.as_raw_fd(), number) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn fcntl(number: RawFd, command: i32, argument: i32) -> io::Result<i32> {
    // SAFETY: these commands take an integer and touch no memory.
    let answer = unsafe { libc::fcntl(number, command, argument) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

/// `fsmount(2)` and friends, x86-64 and arm64 alike (asm-generic numbers).
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FLAG_CLOEXEC: libc::c_uint = 1;
const MOUNT_ATTRS: libc::c_uint =
    (libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC) as libc::c_uint;

/// A tmpfs that is mounted nowhere: it ends with its last descriptor.
pub fn detached_tmpfs(options: &[(&CStr, &CStr)]) -> io::Result<OwnedFd> {
    // SAFETY: a C string constant and a flag.
    let context =
        owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FLAG_CLOEXEC) })?;
    for (key, value) in options {
        // SAFETY: both strings outlive the call.
        check(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                FSCONFIG_SET_STRING,
                key.as_ptr(),
                value.as_ptr(),
                0,
            )
        })?;
    }
    let nothing = std::ptr::null::<libc::c_char>();
    // SAFETY: this command wants no key and no value.
    check(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            nothing,
            nothing,
            0,
        )
    })?;
    // SAFETY: integers only.
    owned(unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FLAG_CLOEXEC, MOUNT_ATTRS)
    })
}

fn check(answer: libc::c_long) -> io::Result<libc::c_long> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

fn owned(answer: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(answer)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
