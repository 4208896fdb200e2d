//! `PAGEMAP_SCAN` for guard regions.

use std::{fs::File, io, os::fd::AsRawFd};

use transship_types::PageRange;

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
struct ScanArgument {
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

const _: () = assert!(size_of::<ScanArgument>() == 96);

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<Region>() == 24);

const PAGE_IS_GUARD: u64 = 1 << 8;

/// Found in one call; a process with more is asked again.
const REGIONS: usize = 256;

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArgument);

/// Guard regions from `start` on and how far it looked; `None` where the
/// kernel has no such call or no such category.
pub fn scan_guards(
    pagemap: &File,
    start: u64,
    end: u64,
) -> io::Result<Option<(Vec<PageRange>, u64)>> {
    let mut regions = [Region::default(); REGIONS];
    let mut argument = ScanArgument {
        size: size_of::<ScanArgument>() as u64,
        flags: 0,
        start,
        end,
        walk_end: 0,
        vec: regions.as_mut_ptr() as u64,
        vec_len: REGIONS as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: PAGE_IS_GUARD,
        category_anyof_mask: 0,
        return_mask: PAGE_IS_GUARD,
    };
    // SAFETY: `argument` has the kernel's layout (asserted above); `regions`
    // has room for `vec_len` of them and outlives the call.
    let found = match unsafe { pagemap_scan(pagemap.as_raw_fd(), &mut argument) } {
        Ok(found) => found as usize,
        Err(nix::Error::ENOTTY | nix::Error::EINVAL) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let found = regions[..found.min(REGIONS)].iter();
    let ranges = found.filter_map(|region| PageRange::new(region.start, region.end).ok()).collect();
    let walked = argument.walk_end.max(start + transship_types::PAGE);
    Ok(Some((ranges, walked)))
}
