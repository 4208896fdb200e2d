//! PAGEMAP_SCAN (Linux 6.7; `linux/fs.h`), on an open /proc/PID/pagemap.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
};

/// The page's VMA is watched by an asynchronous write-protecting userfaultfd.
pub(crate) const WATCHED: u64 = 1 << 0;
/// Written since it was last protected; always set where nothing watches.
pub(crate) const WRITTEN: u64 = 1 << 1;
/// Belongs to a file or to shared memory, not to the process alone.
pub(crate) const FILE: u64 = 1 << 2;
pub(crate) const PRESENT: u64 = 1 << 3;
pub(crate) const SWAPPED: u64 = 1 << 4;
/// The page of zeroes that all processes share.
pub(crate) const ZERO: u64 = 1 << 5;
/// A guard that faults when touched (Linux 6.15).
pub(crate) const GUARD: u64 = 1 << 8;

/// Protects the pages that match, in the same step.
pub(crate) const PROTECT: u64 = 1 << 0;
/// Fails with EPERM where nothing watches, rather than to pass over it.
pub(crate) const CHECK: u64 = 1 << 1;

const PAGEMAP_SCAN: libc::c_ulong = (3 << 30)
    | ((size_of::<Arguments>() as libc::c_ulong) << 16)
    | ((b'f' as libc::c_ulong) << 8)
    | 16;

/// `struct page_region`: pages of the same categories.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Region {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Arguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<Region>() == 24);
const _: () = assert!(size_of::<Arguments>() == 96);

/// Which pages to name: all of `required` (those also in `inverted` must be
/// absent), and at least one of `any`. Regions tell the categories in `tell`
/// apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Filter {
    pub flags: u64,
    pub required: u64,
    pub inverted: u64,
    pub any: u64,
    pub tell: u64,
}

/// Looks through `start..end` until `regions` is full. Answers how many there
/// are and where to go on.
pub(crate) fn scan(
    pagemap: BorrowedFd<'_>,
    (start, end): (u64, u64),
    filter: &Filter,
    regions: &mut [Region],
) -> io::Result<(usize, u64)> {
    let mut arguments = Arguments {
        size: size_of::<Arguments>() as u64,
        flags: filter.flags,
        start,
        end,
        vec: regions.as_mut_ptr().expose_provenance() as u64,
        vec_len: regions.len() as u64,
        category_inverted: filter.inverted,
        category_mask: filter.required,
        category_anyof_mask: filter.any,
        return_mask: filter.tell,
        ..Arguments::default()
    };
    // SAFETY: the kernel reads and writes one argument block (layout asserted
    // above) and writes at most `vec_len` regions to `vec`, which is that
    // long and borrowed for the duration of the call. `start..end` are
    // addresses of another process, the kernel's to check.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
    if found < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((found as usize, arguments.walk_end))
}

/// A page of ours that was read and never written: the one of zeroes.
pub(crate) struct ZeroPage(*mut libc::c_void);

const ONE_PAGE: usize = transship_types::PAGE as usize;

impl ZeroPage {
    pub fn map() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping where the kernel likes it touches nothing.
        let page = unsafe { libc::mmap(ptr::null_mut(), ONE_PAGE, libc::PROT_READ, flags, -1, 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = Self(page);
        // SAFETY: the page is mapped for reading until it is dropped.
        unsafe { page.0.cast::<u8>().read_volatile() };
        Ok(page)
    }

    pub fn address(&self) -> u64 {
        self.0 as u64
    }
}

impl Drop for ZeroPage {
    fn drop(&mut self) {
        // SAFETY: it is ours, of this length, and nothing points into it.
        unsafe { libc::munmap(self.0, ONE_PAGE) };
    }
}
