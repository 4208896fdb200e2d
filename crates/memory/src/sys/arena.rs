//! Memory of our own, taken and given back in chunks.
//!
//! Anonymous, and by the chunk in huge pages or in small ones. It is reached as words that several threads may read and write at once, so
//! that no mix-up above could be worse than wrong bytes.

use std::{
    io, ptr, slice,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::*},
    },
    time::Duration,
};

/// What is taken and given back at once: a huge page.
pub const CHUNK: usize = 2 << 20;

/// Addresses enough for all that it may ever hold; memory only for what was
/// written to.
#[derive(Debug)]
pub struct Arena {
    mapping: *mut u8,
    mapped: usize,
    /// The first whole chunk.
    base: *mut u8,
    chunks: usize,
    /// Bytes from `base` on that may be touched; it only grows, under `opening`.
    open: AtomicUsize,
    opening: Mutex<()>,
}

// SAFETY: the pointers are to a mapping that lives as long as the arena; it is
// only ever reached as atomic words.
unsafe impl Send for Arena {}
// SAFETY: the same.
unsafe impl Sync for Arena {}

impl Arena {
    pub fn reserve(chunks: usize) -> io::Result<Self> {
        let bytes = (chunks.checked_add(1)).and_then(|chunks| chunks.checked_mul(CHUNK));
        let bytes = bytes.ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping, where the kernel likes; nothing refers to it.
        let mapping = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping = mapping.cast::<u8>();
        let base = mapping.wrapping_add(mapping.align_offset(CHUNK));
        let (open, opening) = (AtomicUsize::new(0), Mutex::new(()));
        Ok(Self { mapping, mapped: bytes, base, chunks, open, opening })
    }

    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// Lets everything up to and with this chunk be touched. `huge` is asked
    /// once for each chunk, in order.
    pub fn open(&self, chunk: usize, mut huge: impl FnMut() -> bool) -> io::Result<()> {
        assert!(chunk < self.chunks, "chunk {chunk} of {}", self.chunks);
        let until = (chunk + 1) * CHUNK;
        if self.open.load(Acquire) >= until {
            return Ok(());
        }
        let _opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let from = self.open.load(Acquire);
        for from in (from..until).step_by(CHUNK) {
            let start = self.base.wrapping_add(from).cast();
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: inside our own mapping, by the assertion; nobody has been
            // given this part yet.
            check(unsafe { libc::mprotect(start, CHUNK, access) })?;
            let grain = if huge() { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
            // A kernel without huge pages says no, and small ones do.
            let _ = advise(start, CHUNK, grain);
            // A child that is about to exec need not copy gigabytes of page
            // tables, and a core dump shows no container's memory.
            advise(start, CHUNK, libc::MADV_DONTFORK)?;
            advise(start, CHUNK, libc::MADV_DONTDUMP)?;
            self.open.store(from + CHUNK, Release);
        }
        Ok(())
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let (from, rest) = bytes.as_chunks::<8>();
        assert!(rest.is_empty(), "{} bytes are no words", bytes.len());
        for (word, value) in self.words(offset, bytes.len()).iter().zip(from) {
            word.store(u64::from_ne_bytes(*value), Relaxed);
        }
    }

    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let words = self.words(offset, into.len());
        let (to, rest) = into.as_chunks_mut::<8>();
        assert!(rest.is_empty(), "{} bytes are no words", words.len());
        for (word, value) in words.iter().zip(to) {
            *value = word.load(Relaxed).to_ne_bytes();
        }
    }

    /// For the kernel to read from.
    pub fn address(&self, offset: usize, bytes: usize) -> *const u8 {
        self.words(offset, bytes).as_ptr().cast()
    }

    /// Gives the memory of a chunk back; it reads as zero from now on.
    pub fn release(&self, chunk: usize) -> io::Result<()> {
        let words = self.words(chunk * CHUNK, CHUNK);
        // Whoever reads its words meanwhile reads what was there, or zero.
        advise(words.as_ptr().cast_mut().cast(), CHUNK, libc::MADV_DONTNEED)
    }

    fn words(&self, offset: usize, bytes: usize) -> &[AtomicU64] {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.open.load(Acquire));
        assert!(inside && offset.is_multiple_of(8), "{bytes} bytes at {offset} of the arena");
        // SAFETY: readable and writable up to `open`, which never shrinks, and
        // mapped as long as `self` lives; aligned, as `base` is and `offset`
        // was seen to be. All access is through these atomics, or the kernel's.
        unsafe { slice::from_raw_parts(self.base.add(offset).cast(), bytes / 8) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every slice of it borrowed from us.
        let _ = unsafe { libc::munmap(self.mapping.cast(), self.mapped) };
    }
}

/// What this thread has used of a processor; what others did meanwhile is none
/// of it.
pub fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, which outlives the call. Every
    // kernel has this clock, and without an answer the time is 0.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// `start` lies in a mapping that is ours and private, and is only reached as
/// atomic words.
fn advise(start: *mut libc::c_void, bytes: usize, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: as said above, and no advice given here unmaps anything.
    check(unsafe { libc::madvise(start, bytes, advice) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
