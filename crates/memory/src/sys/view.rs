//! An object of somebody else's, mapped for reading alone.
//!
//! Its pages are found beforehand, while the container runs; what is read
//! afterwards costs no system call and no walk in the kernel.

use std::{fs::File, io, os::fd::AsRawFd, ptr};

use transship_types::PageRange;

#[derive(Debug)]
pub struct View {
    start: *const u8,
    bytes: usize,
}

// SAFETY: a mapping that is only read, lives as long as the view, and belongs
// to no thread.
unsafe impl Send for View {}
// SAFETY: the same.
unsafe impl Sync for View {}

impl View {
    /// Of an object that nobody can make shorter: touching what is beyond its
    /// end would kill this process.
    pub fn of(file: &File, bytes: u64) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let (access, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: a fresh mapping, where the kernel likes; nothing refers to it.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), bytes, access, flags, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A child that is about to exec need not copy gigabytes of page tables,
        // and a core dump shows no container's memory. Refused, they change
        // nothing.
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            // SAFETY: our own mapping; neither unmaps anything.
            unsafe { libc::madvise(start, bytes, advice) };
        }
        Ok(Self { start: start.cast(), bytes })
    }

    pub fn has(&self, range: PageRange) -> bool {
        range.end() <= self.bytes as u64
    }

    /// Finds pages that exist, so that reading them faults no more. Whatever
    /// the kernel does not like of it, reading finds them too.
    pub fn find(&self, range: PageRange) {
        if self.has(range) {
            let start = self.start.wrapping_add(range.start() as usize).cast_mut().cast();
            // SAFETY: inside our own mapping, of which no byte is changed.
            unsafe { libc::madvise(start, range.bytes() as usize, libc::MADV_POPULATE_READ) };
        }
    }

    /// As pread(2) would: what is written meanwhile is read in part, perhaps.
    pub fn read(&self, range: PageRange, into: &mut [u8]) {
        assert!(self.has(range) && into.len() as u64 == range.bytes(), "{range} of a view");
        // SAFETY: inside the mapping, which is readable and as long as the
        // object, and nobody can make that shorter (see `of`). `into` is ours
        // and elsewhere. The bytes may change under the copy, but no reference
        // to them is made, and any bytes are good ones.
        unsafe {
            ptr::copy_nonoverlapping(
                self.start.add(range.start() as usize),
                into.as_mut_ptr(),
                into.len(),
            );
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrowed from it is left.
        unsafe { libc::munmap(self.start.cast_mut().cast(), self.bytes) };
    }
}
