//! Mappings of our own that have one remarkable flag each.

use std::{io, ptr};

use nix::libc;
use transship_types::PAGE;

/// MAP_HUGE_2MB.
const HUGE_PAGE: usize = 2 << 20;

/// What is asked of the kernel for a sample.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// For mmap(2), beside MAP_ANONYMOUS.
    pub flags: libc::c_int,
    /// For madvise(2).
    pub advice: Option<libc::c_int>,
}

/// A mapping without memory behind it, unless it is locked.
pub struct Sample {
    address: *mut libc::c_void,
    bytes: usize,
}

impl Sample {
    /// `None` if the kernel does not grant it.
    pub fn map(wish: Wish) -> Option<Self> {
        let bytes = if wish.flags & libc::MAP_HUGETLB == 0 { PAGE as usize } else { HUGE_PAGE };
        let flags = libc::MAP_ANONYMOUS | wish.flags;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping wherever the kernel likes.
        let address = unsafe { libc::mmap(ptr::null_mut(), bytes, rights, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return None;
        }
        let sample = Self { address, bytes };
        // SAFETY: nobody uses this mapping, whatever becomes of it.
        let advised =
            wish.advice.is_none_or(|advice| unsafe { libc::madvise(address, bytes, advice) } == 0);
        advised.then_some(sample)
    }

    pub fn start(&self) -> u64 {
        self.address as u64
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        // SAFETY: it is ours alone, and nothing of it was ever lent.
        let gone = unsafe { libc::munmap(self.address, self.bytes) };
        debug_assert_eq!(gone, 0, "{}", io::Error::last_os_error());
    }
}
