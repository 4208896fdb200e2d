//! The system calls that no safe wrapper covers; the only unsafe code of the
//! shim.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    os::unix::process::CommandExt,
    process::Command,
};

use nix::{
    libc,
    unistd::{ForkResult, Pid, fork},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Splits this process in two. Some(child) in the parent, None in the child.
///
/// Refused once other threads exist: a child of a multi-threaded process may
/// only call async-signal-safe functions, and ours goes on as the server.
pub fn fork_single_threaded() -> io::Result<Option<Pid>> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("{threads} threads run; only one may fork")));
    }
    // SAFETY: there is exactly one thread (checked above) and it is here, so
    // no lock can be held by a thread that the child does not have.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// Gives `command` the descriptors `fds` as 3, 4, 5, … in the child.
///
/// They must not be below 3 + `fds.len()` themselves; [`above`] sees to that.
pub fn pass_descriptors(command: &mut Command, fds: Vec<OwnedFd>) -> io::Result<()> {
    let floor = 3 + fds.len() as RawFd;
    let fds = fds.into_iter().map(|fd| above(floor, fd)).collect::<io::Result<Vec<_>>>()?;
    let place = move || {
        for (target, fd) in (3..).zip(&fds) {
            // SAFETY: plain system call on descriptors owned by the closure;
            // no target is one of the sources, because those are above all
            // targets. dup2 clears close-on-exec, which is the purpose.
            if unsafe { libc::dup2(fd.as_raw_fd(), target) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and calls dup2 only,
    // which is async-signal-safe; it allocates nothing.
    unsafe { command.pre_exec(place) };
    Ok(())
}

/// Takes ownership of a descriptor that a message (SCM_RIGHTS) brought.
pub fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller got the number from recvmsg, which has made the
    // descriptor for it; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn above(floor: RawFd, fd: OwnedFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() >= floor {
        return Ok(fd);
    }
    let raw = nix::fcntl::fcntl(fd.as_fd(), nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(floor))?;
    // SAFETY: fcntl has just made this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Bytes that lie unread in a pipe or fifo.
pub fn unread(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int; `count` is one and outlives the call.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &mut count) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(count.max(0) as usize) }
}

/// Sets the size of a terminal; its foreground processes get SIGWINCH.
pub fn resize_terminal(fd: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize; `size` is one and outlives the call.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Watches a descriptor for readiness. For types of this crate and of the
/// standard library, which hold one descriptor for as long as they live.
pub fn watch<T: AsRawFd>(inner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: `inner` moves into the AsyncFd, which deregisters the
    // descriptor before it drops it; the types it is used for (OwnedFd, File,
    // EventFd) always give the same descriptor.
    unsafe { AsyncFd::register_with_interest(inner, interest) }
        .map_err(|error| error.into_parts().1)
}

/// Sends any signal, real-time ones included; 0 only asks.
pub fn send_signal(pid: i32, signal: u32) -> io::Result<()> {
    let signal = libc::c_int::try_from(signal).map_err(|_| io::ErrorKind::InvalidInput)?;
    // A pid of 0 or below would address a group.
    if pid <= 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: kill takes two numbers and touches no memory.
    let done = unsafe { libc::kill(pid, signal) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives this process group a core scheduling cookie of its own (prctl(2),
/// PR_SCHED_CORE), so that no foreign task shares a core's hyper-threads.
pub fn new_core_cookie() -> io::Result<()> {
    /// `enum pid_type`: PIDTYPE_PGID, from linux/pid.h.
    const PROCESS_GROUP: libc::c_ulong = 2;
    // SAFETY: PR_SCHED_CORE_CREATE takes numbers only; pid 0 is this process
    // and the last argument must be null for this command.
    let done = unsafe {
        libc::prctl(libc::PR_SCHED_CORE, libc::PR_SCHED_CORE_CREATE, 0, PROCESS_GROUP, 0)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Keeps the C library's allocator to one arena and returns freed memory
/// early: a shim lives as long as its container and mostly sleeps.
pub fn spare_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets parameters of the allocator; called before
    // any other thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
    }
}

/// Sets an interface of the current network namespace up (netdevice(7)).
pub fn interface_up(name: &str) -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
    // SAFETY: all-zero bytes are a valid `ifreq`: a name and a union of
    // integers and addresses.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays 0: the name ends there.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: `request` has the kernel's layout and outlives both calls; the
    // kernel reads the name and writes, then reads, the flags.
    unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_child_finds_its_descriptors_at_three_and_up() {
        let (mut read_one, write_one) = std::io::pipe().unwrap();
        let (mut read_two, write_two) = std::io::pipe().unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo one >&3; echo two >&4"]);
        pass_descriptors(&mut command, vec![write_one.into(), write_two.into()]).unwrap();
        let mut child = command.spawn().unwrap();
        drop(command);
        assert!(child.wait().unwrap().success());
        let (mut one, mut two) = (String::new(), String::new());
        read_one.read_to_string(&mut one).unwrap();
        read_two.read_to_string(&mut two).unwrap();
        assert_eq!((one.as_str(), two.as_str()), ("one\n", "two\n"));
    }

    #[test]
    fn unread_counts_what_a_pipe_holds() {
        let (read, mut write) = std::io::pipe().unwrap();
        assert_eq!(unread(read.as_fd()).unwrap(), 0);
        write.write_all(b"four").unwrap();
        assert_eq!(unread(write.as_fd()).unwrap(), 4);
    }
}
