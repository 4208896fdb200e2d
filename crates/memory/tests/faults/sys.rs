//! What a restored program does to its memory, and what CRIU's restorer does
//! before it: none of it is safe.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

pub const PAGE: u64 = 4096;

fn check(result: i64) -> i64 {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

/// A userfaultfd as CRIU makes it: with the events of forks, moves, removals.
pub fn userfaultfd() -> OwnedFd {
    const EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
    const API: libc::c_ulong = 0xC018_AA3F;
    let mut api = [0xAA_u64, EVENTS, 0];
    // SAFETY: no pointers; then a structure of the size that the number says.
    unsafe {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = check(libc::syscall(libc::SYS_userfaultfd, flags)) as RawFd;
        check(libc::ioctl(fd, API, &mut api).into());
        OwnedFd::from_raw_fd(fd)
    }
}

pub fn register(uffd: RawFd, start: u64, pages: u64) {
    const REGISTER: libc::c_ulong = 0xC020_AA00;
    let mut register = [start, pages * PAGE, 1, 0];
    // SAFETY: a structure of the size that the number says.
    check(unsafe { libc::ioctl(uffd, REGISTER, &mut register) }.into());
}

pub fn map(start: u64, pages: u64) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: only where nothing is.
    let at = unsafe { libc::mmap(start as *mut _, (pages * PAGE) as usize, access, flags, -1, 0) };
    assert_eq!(at as u64, start, "{}", io::Error::last_os_error());
    // SAFETY: just mapped.
    unsafe { libc::madvise(at, (pages * PAGE) as usize, libc::MADV_NOHUGEPAGE) };
}

pub fn unmap(start: u64, pages: u64) {
    // SAFETY: only what `map` has made, whose addresses the test alone uses.
    check(unsafe { libc::munmap(start as *mut _, (pages * PAGE) as usize) }.into());
}

pub fn remap(start: u64, pages: u64, to: u64) {
    let (bytes, flags) = ((pages * PAGE) as usize, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
    // SAFETY: as in `unmap`.
    let at = unsafe { libc::mremap(start as *mut _, bytes, bytes, flags, to as *mut u8) };
    assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
}

pub fn dontneed(start: u64, pages: u64) {
    let bytes = (pages * PAGE) as usize;
    // SAFETY: as in `unmap`.
    check(unsafe { libc::madvise(start as *mut _, bytes, libc::MADV_DONTNEED) }.into());
}

pub fn word(at: u64) -> u64 {
    // SAFETY: mapped by `map`, aligned, and all access is atomic.
    unsafe { AtomicU64::from_ptr(ptr::without_provenance_mut(at as usize)) }.load(Relaxed)
}

/// What `run` answers (up to 100) in a fork of ours.
pub fn in_fork(run: impl FnOnce() -> u64) -> u64 {
    // SAFETY: the child only reads memory and ends.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(run().min(100) as i32);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) as u64 } else { 101 }
    }
}
