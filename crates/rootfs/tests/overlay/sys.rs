//! The one thing these tests need that no safe wrapper covers.

use std::{fs::File, os::fd::AsRawFd};

/// A file mapped shared, as a program of a container does.
pub struct Mapping {
    start: *mut u8,
    length: usize,
}

impl Mapping {
    pub fn of(file: &File, length: usize) -> Self {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of an open file, at an address of the
        // kernel's choice.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), length, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: start.cast(), length }
    }

    pub fn store(&self, at: usize, value: u8) {
        assert!(at < self.length);
        // SAFETY: inside of the mapping, which lives as long as `self`.
        unsafe { self.start.add(at).write_volatile(value) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `of`, and not used any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}
