//! /proc/PID/pagemap, by its ioctl or entry by entry, and which of a
//! process's pages are its own.
//!
//! A page of its own is there or swapped out, belongs to no file and no shared
//! memory, and is not the page of zeroes. Files' pages that it changed (a
//! private mapping's) are its own as well.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
};

use transship_types::{PAGE, PageRange, PageSet};

use crate::{
    maps::{self, Mapping},
    sys::pagemap::{self, CHECK, FILE, GUARD, PRESENT, PROTECT, SWAPPED, WATCHED, WRITTEN, ZERO},
};

pub(super) use crate::sys::pagemap::Region;

/// Regions asked for at a time: the kernel collects 512 itself, and a process
/// whose every other page changed has many.
const REGIONS: usize = 4096;
/// Entries read at a time, of 8 bytes each.
const ENTRIES: usize = 1 << 16;

/// How pages are told apart, the ioctl's way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Categories {
    /// What a page of a process's own is not, be the mapping a file's or not.
    foreign: u64,
}

/// The categories, as they are asked for in one kind of mapping.
///
/// In anonymous memory no page is a file's, and not to ask saves nine tenths
/// of the time: the kernel would have to look at each page itself rather than
/// at the page tables alone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Own {
    foreign: u64,
}

impl Categories {
    /// What this kernel knows of our own pagemap.
    pub fn known() -> Result<Self, String> {
        let own = File::open("/proc/self/pagemap").map_err(|error| error.to_string())?;
        let mut outcome = Err("never asked".to_owned());
        for foreign in [ZERO | GUARD, ZERO] {
            let categories = Self { foreign };
            let filter = categories.within(true).own(0);
            match pagemap::scan(own.as_fd(), (0, PAGE), &filter, &mut [Region::default()]) {
                Ok(_) => return Ok(categories),
                Err(error) => outcome = Err(format!("the kernel has no PAGEMAP_SCAN ({error})")),
            }
        }
        outcome
    }

    pub fn within(self, file: bool) -> Own {
        Own { foreign: if file { self.foreign | FILE } else { self.foreign } }
    }
}

impl Own {
    /// The pages of a process's own.
    fn own(self, tell: u64) -> pagemap::Filter {
        pagemap::Filter {
            flags: 0,
            required: self.foreign,
            inverted: self.foreign,
            // Without this the kernel would protect holes, and build page
            // tables for them.
            any: PRESENT | SWAPPED,
            tell,
        }
    }

    /// The same, told apart by whether they are watched, written and swapped.
    pub fn look(self) -> pagemap::Filter {
        self.own(WATCHED | WRITTEN | SWAPPED)
    }

    /// Everything that may differ from what was last known: pages that were
    /// written or are not watched, and places without a page. What is left
    /// out is watched, unwritten and there.
    pub fn news(self) -> pagemap::Filter {
        pagemap::Filter {
            flags: 0,
            required: 0,
            inverted: PRESENT,
            any: WRITTEN | PRESENT,
            tell: WATCHED | WRITTEN | PRESENT | SWAPPED | self.foreign,
        }
    }

    /// Whether a region of those is pages of the process's own.
    pub fn holds(self, region: &Region) -> bool {
        region.categories & self.foreign == 0 && region.categories & (PRESENT | SWAPPED) != 0
    }

    /// The same, all of them.
    pub fn all(self) -> pagemap::Filter {
        self.own(PRESENT | SWAPPED)
    }

    /// All of them, to be watched from now on.
    pub fn arm(self) -> pagemap::Filter {
        pagemap::Filter { flags: PROTECT | CHECK, ..self.all() }
    }

    /// Those that were written, to be watched again from now on.
    pub fn rearm(self) -> pagemap::Filter {
        let filter = self.own(WRITTEN);
        pagemap::Filter { flags: PROTECT | CHECK, required: filter.required | WRITTEN, ..filter }
    }
}

/// Whether a region counts as changed: written, or not watched at all.
pub(super) fn changed(region: &Region) -> bool {
    region.categories & WATCHED == 0 || region.categories & WRITTEN != 0
}

/// Whether the page of a file's private mapping may show the file again.
///
/// When a page that we protected is given back there (MADV_DONTNEED), the
/// kernel keeps a marker in its place that looks like a page in swap, and an
/// unwritten one. What it reads as is the file's contents. Pages that really
/// are swapped out look the same.
pub(super) fn reverted(region: &Region) -> bool {
    region.categories & SWAPPED != 0
}

/// The page tables of one address space: that which the process had when this
/// was opened.
pub(super) struct Pagemap {
    file: File,
    regions: Vec<Region>,
}

impl Pagemap {
    /// None if the process has ended.
    pub fn open(pid: i32) -> io::Result<Option<Self>> {
        match File::open(format!("/proc/{pid}/pagemap")) {
            Ok(file) => Ok(Some(Self { file, regions: vec![Region::default(); REGIONS] })),
            Err(error) if maps::gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Calls `found` with each region of the range that passes the filter. An
    /// error may come after some.
    pub fn scan(
        &mut self,
        range: PageRange,
        filter: &pagemap::Filter,
        mut found: impl FnMut(&Region),
    ) -> io::Result<()> {
        let mut at = range.start();
        while at < range.end() {
            let (count, next) =
                pagemap::scan(self.file.as_fd(), (at, range.end()), filter, &mut self.regions)?;
            self.regions[..count].iter().for_each(&mut found);
            if next <= at {
                break;
            }
            at = next;
        }
        Ok(())
    }
}

/// Collects ranges that come in order; those that touch become one before the
/// set has to find their place.
#[derive(Default)]
pub(super) struct Collector {
    set: PageSet,
    open: Option<(u64, u64)>,
}

impl Collector {
    pub fn add(&mut self, start: u64, end: u64) {
        match &mut self.open {
            Some((_, until)) if *until == start => *until = end,
            _ => {
                self.flush();
                self.open = Some((start, end));
            }
        }
    }

    pub fn finish(mut self) -> PageSet {
        self.flush();
        self.set
    }

    fn flush(&mut self) {
        // The kernel names no range of its user's that is none.
        if let Some(range) = self.open.take().and_then(|(s, e)| PageRange::new(s, e).ok()) {
            self.set.insert(range);
        }
    }
}

/// The mappings that move, as few ranges as possible, and whether they are of
/// files: holes between them cost nothing to look through, calls do.
pub(super) fn spans(maps: &[Mapping]) -> Vec<(PageRange, bool)> {
    let mut spans: Vec<(PageRange, bool)> = Vec::new();
    let mut joins = false;
    for mapping in maps {
        if !mapping.moves() {
            joins = false;
            continue;
        }
        let joined = spans
            .last()
            .filter(|(_, file)| joins && *file == mapping.file)
            .and_then(|(last, _)| PageRange::new(last.start(), mapping.range.end()).ok());
        match (joined, spans.last_mut()) {
            (Some(joined), Some((last, _))) => *last = joined,
            _ => spans.push((mapping.range, mapping.file)),
        }
        joins = true;
    }
    spans
}

/// How pages are told apart, the old way: one entry of 64 bits for each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entries {
    /// Where the page of zeroes is in this machine's memory. 0 if the kernel
    /// does not tell us: those pages then move like any other.
    zeroes: u64,
}

/// Bits of an entry (`Documentation/admin-guide/mm/pagemap.rst`).
mod bit {
    pub const PRESENT: u64 = 1 << 63;
    pub const SWAPPED: u64 = 1 << 62;
    pub const FILE: u64 = 1 << 61;
    pub const SOFT_DIRTY: u64 = 1 << 55;
    pub const FRAME: u64 = (1 << 55) - 1;
}

impl Entries {
    pub fn new(zeroes: u64) -> Self {
        Self { zeroes }
    }

    /// Asks where the page of zeroes is.
    pub fn known() -> io::Result<Self> {
        let page = crate::sys::pagemap::ZeroPage::map()?;
        let own = File::open("/proc/self/pagemap")?;
        let mut entry = [0; 8];
        own.read_exact_at(&mut entry, page.address() / PAGE * 8)?;
        let entry = u64::from_ne_bytes(entry);
        Ok(Self::new(if entry & bit::PRESENT == 0 { 0 } else { entry & bit::FRAME }))
    }

    /// Whether a page is the process's own, and whether it is soft-dirty.
    pub fn decode(self, entry: u64) -> Option<bool> {
        let exists = entry & (bit::PRESENT | bit::SWAPPED) != 0;
        let zero =
            entry & bit::PRESENT != 0 && self.zeroes != 0 && entry & bit::FRAME == self.zeroes;
        let own = exists && entry & bit::FILE == 0 && !zero;
        own.then_some(entry & bit::SOFT_DIRTY != 0)
    }

    /// What `pagemap` says of the mappings that move: the pages that are the
    /// process's own, the soft-dirty ones in `dirty`.
    pub fn read(self, pagemap: &Path, maps: &[Mapping]) -> io::Result<super::Pages> {
        let file = match File::open(pagemap) {
            Err(error) if maps::gone(&error) => return Ok(super::Pages::default()),
            file => file?,
        };
        let (mut dirty, mut present) = (Collector::default(), Collector::default());
        let mut bytes = vec![0; ENTRIES * 8];
        for mapping in maps.iter().filter(|mapping| mapping.moves()) {
            let mut at = mapping.range.start();
            while at < mapping.range.end() {
                let wanted = ((mapping.range.end() - at) / PAGE * 8).min(bytes.len() as u64);
                let read = file.read_at(&mut bytes[..wanted as usize], at / PAGE * 8)? / 8;
                // The process ended.
                if read == 0 {
                    break;
                }
                for entry in bytes[..read * 8].chunks_exact(8) {
                    let entry = u64::from_ne_bytes(entry.try_into().expect("chunks of eight"));
                    if let Some(soft_dirty) = self.decode(entry) {
                        present.add(at, at + PAGE);
                        if soft_dirty {
                            dirty.add(at, at + PAGE);
                        }
                    }
                    at += PAGE;
                }
            }
        }
        Ok(super::Pages { dirty: dirty.finish(), present: present.finish() })
    }

    /// Whether a page of ours that was just written is marked so.
    pub fn soft_dirty_known() -> io::Result<bool> {
        let fresh = vec![1u8; 2 * PAGE as usize];
        let address = fresh.as_ptr() as u64;
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, address / PAGE * 8)?;
        std::hint::black_box(&fresh);
        Ok(u64::from_ne_bytes(entry) & bit::SOFT_DIRTY != 0)
    }
}

/// Either way, for whoever only wants to know what there is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Table {
    Scanned(Categories),
    Read(Entries),
}

impl Table {
    pub fn best() -> Result<Self, String> {
        match Categories::known() {
            Ok(categories) => Ok(Self::Scanned(categories)),
            Err(_) => Entries::known().map(Self::Read).map_err(|error| error.to_string()),
        }
    }

    pub fn present(self, pid: i32) -> io::Result<PageSet> {
        let maps = maps::of(pid)?;
        match self {
            Self::Read(entries) => {
                Ok(entries.read(Path::new(&format!("/proc/{pid}/pagemap")), &maps)?.present)
            }
            Self::Scanned(categories) => {
                let Some(mut pagemap) = Pagemap::open(pid)? else { return Ok(PageSet::new()) };
                let mut present = Collector::default();
                for (span, file) in spans(&maps) {
                    let all = categories.within(file).all();
                    pagemap.scan(span, &all, |r| present.add(r.start, r.end))?;
                }
                Ok(present.finish())
            }
        }
    }
}
