//! Other processes: handles on them, their descriptors, their memory.

use std::{
    cmp::Ordering,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use libc::{c_int, c_long, pid_t};

/// `enum kcmp_type`, from `linux/kcmp.h`.
const KCMP_VM: c_int = 1;
/// Ranges that one process_vm_readv takes.
pub(crate) const VECTORS: usize = libc::UIO_MAXIOV as usize;

/// A handle that stays this process's when its number is used again.
pub(crate) fn open(pid: pid_t) -> io::Result<OwnedFd> {
    // SAFETY: takes two numbers.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Whether the process is there, be it as a zombie.
pub(crate) fn exists(process: BorrowedFd<'_>) -> bool {
    // SAFETY: signal 0 asks only; a null siginfo stands for kill(2)'s.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            0,
            ptr::null_mut::<libc::siginfo_t>(),
            0,
        )
    };
    done == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
}

/// A copy of another process's descriptor.
pub(crate) fn take_descriptor(process: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes three numbers.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// Orders processes by the address space they run in: equal means the same.
pub(crate) fn compare_spaces(one: pid_t, other: pid_t) -> io::Result<Ordering> {
    // SAFETY: takes numbers only for this kind of comparison.
    match unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) } {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Copies ranges (address, bytes), at most [`VECTORS`], of another process to
/// the front of `into`. Answers how many bytes came before one could not be
/// read; an error if that was the first.
pub(crate) fn read(pid: pid_t, ranges: &[(u64, usize)], into: &mut [u8]) -> io::Result<usize> {
    debug_assert!(ranges.iter().map(|(_, bytes)| bytes).sum::<usize>() <= into.len());
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote: Vec<libc::iovec> = ranges
        .iter()
        .map(|&(address, bytes)| libc::iovec {
            iov_base: ptr::without_provenance_mut(address as usize),
            iov_len: bytes,
        })
        .collect();
    // SAFETY: the kernel writes at most the length of `local`, which is
    // borrowed for the duration of the call; `remote` is another process's,
    // the kernel's to check.
    let read = unsafe {
        libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), remote.len() as _, 0)
    };
    if read < 0 { Err(io::Error::last_os_error()) } else { Ok(read as usize) }
}

fn descriptor(number: c_long) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system call has just made this descriptor; nobody else
    // knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number as RawFd) })
}
