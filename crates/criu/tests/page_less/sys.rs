//! The calls of the target and of the server that need `unsafe`.

use std::{
    fs::File,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use nix::{
    libc,
    sys::signal::{SigSet, Signal},
};

use crate::server::Memory;

const PAGE: usize = 4096;
const MADV_GUARD_INSTALL: i32 = 102;

pub enum Kind<'a> {
    Anonymous,
    /// With this advice of madvise(2).
    Advised(i32),
    /// With this flag of mmap(2).
    Flagged(i32),
    Locked,
    Shared,
    File(&'a Path),
}

pub fn map(bytes: usize, kind: Kind<'_>) -> &'static mut [u8] {
    let private = libc::MAP_PRIVATE;
    let (flags, file) = match kind {
        Kind::Flagged(flag) => (private | libc::MAP_ANONYMOUS | flag, None),
        Kind::Anonymous | Kind::Locked | Kind::Advised(_) => (private | libc::MAP_ANONYMOUS, None),
        Kind::Shared => (libc::MAP_SHARED | libc::MAP_ANONYMOUS, None),
        Kind::File(path) => (private, Some(File::open(path).expect("the file"))),
    };
    let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping wherever the kernel likes, never unmapped.
    unsafe {
        let address = libc::mmap(std::ptr::null_mut(), bytes, rights, flags, fd, 0);
        assert_ne!(address, libc::MAP_FAILED);
        if let Kind::Advised(advice) = kind {
            // Not every kernel knows each of them.
            libc::madvise(address, bytes, advice);
        }
        std::slice::from_raw_parts_mut(address.cast(), bytes)
    }
}

/// Makes a hole that must not be touched. Older kernels have none.
pub fn guard(memory: &mut [u8]) {
    // SAFETY: the caller touches it no more.
    unsafe { libc::madvise(memory.as_mut_ptr().cast(), memory.len(), MADV_GUARD_INSTALL) };
}

pub fn fork() -> i32 {
    // SAFETY: there is one thread.
    unsafe { libc::fork() }
}

/// Locks the one, and takes all rights from the other.
pub fn lock_and_close(locked: &mut [u8], closed: &mut [u8]) {
    // SAFETY: `closed` is read again only in `with_access`.
    unsafe {
        assert_eq!(libc::mlock(locked.as_ptr().cast(), locked.len()), 0);
        assert_eq!(libc::mprotect(closed.as_mut_ptr().cast(), closed.len(), libc::PROT_NONE), 0);
    }
}

pub fn with_access(closed: &mut [u8], read: impl FnOnce(&[u8])) {
    let (address, bytes) = (closed.as_mut_ptr().cast(), closed.len());
    // SAFETY: the mapping is the caller's.
    assert_eq!(unsafe { libc::mprotect(address, bytes, libc::PROT_READ) }, 0);
    read(closed);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::mprotect(address, bytes, libc::PROT_NONE) }, 0);
}

/// CRIU need not know the test's files.
pub fn close_everything() {
    // SAFETY: nothing here uses a descriptor afterwards.
    unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
}

pub fn block_the_asking_signal() {
    asking().thread_block().expect("a mask");
}

pub fn wait_to_be_asked() {
    asking().wait().expect("a signal");
}

fn asking() -> SigSet {
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR1);
    set
}

/// Answers of the threads, 0 while there is none.
pub static STACKS: [AtomicU64; 3] = [AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0)];

pub fn answer_for_stack(number: usize, sum: u64) {
    STACKS[number].store(sum | 1, Ordering::Release);
}

pub fn ask_stack(sum: u64, answer: &AtomicU64) -> u64 {
    loop {
        match answer.swap(0, Ordering::Acquire) {
            0 => thread::sleep(Duration::from_millis(1)),
            answered => return sum.rotate_left(7) ^ answered,
        }
    }
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    start: u64,
    len: u64,
    mode: u64,
    zeroed: i64,
}

nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, Copy);
nix::ioctl_readwrite!(uffdio_zeropage, 0xaa, 0x04, Zero);

/// Until the process is gone.
pub fn serve(uffd: OwnedFd, memory: &Memory, served: &AtomicUsize) {
    let fd = uffd.as_raw_fd();
    let mut message = [0_u8; 32];
    loop {
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one `pollfd` that outlives the call.
        unsafe { libc::poll(&mut poll, 1, -1) };
        if poll.revents & (libc::POLLERR | libc::POLLHUP) != 0 {
            return;
        }
        // SAFETY: the buffer is as long as we say.
        let read = unsafe { libc::read(fd, message.as_mut_ptr().cast(), message.len()) };
        if read != 32 {
            continue;
        }
        match message[0] {
            0x12 => {}
            // SAFETY: the kernel made this descriptor with the message.
            0x13 => drop(unsafe { OwnedFd::from_raw_fd(number(&message[8..12]) as i32) }),
            _ => continue,
        }
        if message[0] != 0x12 {
            continue;
        }
        let page = number(&message[16..24]) & !(PAGE as u64 - 1);
        let len = PAGE as u64;
        // SAFETY: both have the kernel's layout; `bytes` is a page.
        unsafe {
            if let Some(bytes) = memory.get(&page) {
                let src = bytes.as_ptr() as u64;
                let _ = uffdio_copy(fd, &mut Copy { dst: page, src, len, mode: 0, copied: 0 });
                served.fetch_add(1, Ordering::Relaxed);
            } else {
                let _ = uffdio_zeropage(fd, &mut Zero { start: page, len, mode: 0, zeroed: 0 });
            }
        }
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Takes over a descriptor that SCM_RIGHTS has just brought.
pub fn received(descriptor: i32) -> OwnedFd {
    // SAFETY: the kernel has installed it for us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}
