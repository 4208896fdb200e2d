//! Putting pages into the images of one process, or of one shared object.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
};

use prost::Message;
use transship_types::{PAGE, PageRange, PageSet, Space};

use super::{
    PagesError,
    image::{Image, PagemapEntry, PagemapHead, Type, Writer},
    layout::ProcessLayout,
};
use crate::{CriuError, images::MemoryDir};

/// Pages fetched and written at once: a large enough write, a small buffer.
const FETCHED_PAGES: u64 = 256;

/// Flags of a pagemap entry (criu/include/pagemap.h).
mod entry {
    pub const PARENT: u32 = 1 << 0;
    pub const LAZY: u32 = 1 << 1;
    pub const PRESENT: u32 = 1 << 2;
}

/// Where the pages of one process will come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Completed {
    /// From the fault server; a fault elsewhere is a page of zeros.
    pub lazy: PageSet,
    /// From the image, into which they were written now.
    pub eager_pages: u64,
    /// From the image, into which CRIU had saved them.
    pub criu_pages: u64,
    /// In no mapping that CRIU restores with contents (`MAP_DROPPABLE`, for
    /// example): lost, as their owner must expect.
    pub unplaced_pages: u64,
}

/// Of these pages, those that must be there before CRIU restores: it puts them
/// in place itself.
pub fn eager(layout: &ProcessLayout, pages: &PageSet) -> PageSet {
    parted(layout, pages).1
}

/// Which of the pages CRIU leaves to a fault server, and which not.
fn parted(layout: &ProcessLayout, pages: &PageSet) -> (PageSet, PageSet) {
    let (mut lazy, mut eager) = (PageSet::new(), PageSet::new());
    for vma in layout.vmas.iter().filter(|vma| vma.private) {
        for range in pages.within(vma.range) {
            if vma.lazy { lazy.insert(range) } else { eager.insert(range) }
        }
    }
    let stacks = lazy.intersection(&layout.stacks);
    lazy.subtract(&stacks);
    eager.extend(&stacks);
    (lazy, eager)
}

/// Completes `pagemap-VPID.img` and its `pages-N.img` with the pages that were
/// `present` at the freeze. `fetch` fills the bytes of a range of at most 256
/// pages that CRIU is to restore eagerly.
pub fn complete(
    dir: &MemoryDir,
    layout: &ProcessLayout,
    present: &PageSet,
    fetch: &mut dyn FnMut(PageRange, &mut [u8]) -> io::Result<()>,
) -> Result<Completed, PagesError> {
    let space = Space::Process(layout.vpid);
    let pagemap = Pagemap::read(dir, space)?;
    let saved: PageSet = pagemap.saved.iter().copied().collect();
    let mut missing = present.clone();
    missing.subtract(&saved);
    let (lazy, eager) = parted(layout, &missing);
    let completed = Completed {
        eager_pages: eager.pages(),
        criu_pages: saved.pages(),
        unplaced_pages: missing.pages() - eager.pages() - lazy.pages(),
        lazy,
    };
    if !eager.is_empty() {
        pagemap.merge(dir, space, &eager, fetch)?;
    } else if pagemap.marked_lazy {
        write_pagemap(dir, space, pagemap.pages_id, &pagemap.saved)?;
    }
    Ok(completed)
}

/// Where the contents of one shared object will come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CompletedShared {
    /// Pages that were written into the image now.
    pub pages: u64,
    /// Pages that CRIU had saved: then it has saved all of them.
    pub criu_pages: u64,
}

/// Where the pages of a shared object are, each at its offset, and nothing
/// else but holes.
#[derive(Clone, Copy)]
pub enum Contents<'a> {
    /// In a file of the directory of the images, which is there no more
    /// afterwards.
    Image(&'a str),
    /// Somewhere else.
    Open(&'a File),
}

impl Contents<'_> {
    fn remove(self, dir: &MemoryDir) -> Result<(), CriuError> {
        match self {
            Contents::Image(name) => dir.remove(name),
            Contents::Open(_) => Ok(()),
        }
    }
}

/// Completes `pagemap-shmem-INODE.img` and its `pages-N.img` with the pages of
/// a shared object that were `present` at the freeze, by their offset in it.
///
/// CRIU saves such an object whole or, where it was made to find it empty, not
/// at all. If it saved it, its images stay as they are. An object that it does
/// not know is an error: its contents would be lost.
pub fn complete_shared(
    dir: &MemoryDir,
    inode: u64,
    present: &PageSet,
    contents: Contents<'_>,
) -> Result<CompletedShared, PagesError> {
    let Some(end) = present.iter().last().map(|range| range.end()) else {
        // CRIU has no image for an object of no size.
        return Ok(CompletedShared::default());
    };
    let space = Space::Shared(inode);
    let pagemap = Pagemap::read(dir, space)?;
    let criu_pages = pagemap.saved.iter().map(|range| range.pages()).sum();
    if criu_pages > 0 {
        contents.remove(dir)?;
        return Ok(CompletedShared { pages: 0, criu_pages });
    }
    let pages = present.pages();
    let done = CompletedShared { pages, criu_pages: 0 };
    let file = match contents {
        Contents::Open(file) => file,
        Contents::Image(name) => {
            // Few holes, which become zeros: it is the image already.
            let whole = PageRange::new(0, end).ok();
            if let Some(whole) = whole.filter(|whole| whole.pages() - pages <= pages / 8) {
                dir.set_len(name, end)?;
                dir.rename(name, &format!("pages-{}.img", pagemap.pages_id))?;
                write_pagemap(dir, space, pagemap.pages_id, &[whole])?;
                return Ok(done);
            }
            &dir.open(name)?
        }
    };
    pagemap
        .merge(dir, space, present, &mut |range, into| file.read_exact_at(into, range.start()))?;
    contents.remove(dir)?;
    Ok(done)
}

/// What CRIU saved.
pub(super) struct Pagemap {
    pages_id: u32,
    /// In order of address, which is the order of `pages-N.img` as well.
    pub saved: Vec<PageRange>,
    /// CRIU marks even pages that it has saved, and would then not read them.
    marked_lazy: bool,
}

impl Pagemap {
    pub fn read(dir: &MemoryDir, space: Space) -> Result<Self, PagesError> {
        let name = name_of(space);
        let Some(image) = Image::read(dir, name.clone(), Type::Pagemap)? else {
            return Err(PagesError::Image { path: dir.path().join(name), why: "it is missing" });
        };
        let bad = |why| image.bad(dir, why);
        let mut records = image.records();
        let head = records.next().ok_or(bad("it has no head"))?.map_err(bad)?;
        let head = PagemapHead::decode(head).map_err(|_| bad("its head cannot be read"))?;
        let mut pagemap = Self { pages_id: head.pages_id, saved: Vec::new(), marked_lazy: false };
        for record in records {
            let entry = PagemapEntry::decode(record.map_err(bad)?)
                .map_err(|_| bad("an entry cannot be read"))?;
            let flags = entry.flags.unwrap_or(entry::PRESENT);
            if flags & entry::PARENT != 0 || entry.in_parent == Some(true) {
                return Err(bad("pages are in a parent image, which we never asked for"));
            }
            pagemap.marked_lazy |= flags & entry::LAZY != 0;
            if flags & entry::PRESENT == 0 {
                continue;
            }
            let pages = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
            let range = PageRange::of_pages(entry.vaddr, pages)
                .map_err(|_| bad("an entry is no range of pages"))?;
            if pagemap.saved.last().is_some_and(|last| last.end() > range.start()) {
                return Err(bad("its entries are not in order"));
            }
            pagemap.saved.push(range);
        }
        Ok(pagemap)
    }

    /// Writes both images anew. CRIU reads pages one after the other, so the
    /// new ones must stand among the old ones in order of address.
    fn merge(
        &self,
        dir: &MemoryDir,
        space: Space,
        eager: &PageSet,
        fetch: &mut dyn FnMut(PageRange, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), PagesError> {
        let name = format!("pages-{}.img", self.pages_id);
        let path = dir.path().join(&name);
        let mut old = dir.open(&name)?;
        let all = in_order(&self.saved, eager);
        let mut failed = None;
        let mut buffer = vec![0; (FETCHED_PAGES * PAGE) as usize];
        let mut at = 0;
        let written = dir.replace(&name, |new| {
            for &(range, is_saved) in &all {
                if is_saved {
                    copy(&mut old, at, range.bytes(), new)?;
                    at += range.bytes();
                    continue;
                }
                let mut rest = Some(range);
                while let Some(range) = rest {
                    let (now, later) = range.split(FETCHED_PAGES);
                    let bytes = &mut buffer[..now.bytes() as usize];
                    if let Err(source) = fetch(now, bytes) {
                        failed = Some(PagesError::Fetch { space, range: now, source });
                        return Err(io::ErrorKind::Other.into());
                    }
                    new.write_all(bytes)?;
                    rest = later;
                }
            }
            Ok(())
        });
        if let Some(failed) = failed {
            return Err(failed);
        }
        written.map_err(|error| match error {
            CriuError::File { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof => {
                PagesError::Image { path, why: "it has fewer pages than its pagemap" }
            }
            other => other.into(),
        })?;
        let ranges: Vec<PageRange> = all.into_iter().map(|(range, _)| range).collect();
        write_pagemap(dir, space, self.pages_id, &ranges)
    }
}

/// Both in order of address, with whether CRIU has saved it. They do not
/// overlap: what CRIU has saved is not missing.
fn in_order(saved: &[PageRange], eager: &PageSet) -> Vec<(PageRange, bool)> {
    let mut all: Vec<_> = saved.iter().map(|&range| (range, true)).collect();
    all.extend(eager.iter().map(|range| (range, false)));
    all.sort_unstable_by_key(|(range, _)| range.start());
    all
}

fn copy(from: &mut File, at: u64, bytes: u64, to: &mut File) -> io::Result<()> {
    from.seek(SeekFrom::Start(at))?;
    let copied = io::copy(&mut io::Read::take(from, bytes), to)?;
    if copied < bytes { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// Number of pages in both fields: CRIU up to 4.1 reads the one, later ones
/// the other.
fn write_pagemap(
    dir: &MemoryDir,
    space: Space,
    pages_id: u32,
    ranges: &[PageRange],
) -> Result<(), PagesError> {
    let mut image = Writer::new(Type::Pagemap);
    image.record(&PagemapHead { pages_id }.encode_to_vec());
    for range in ranges.iter().flat_map(|&range| narrow(range)) {
        let entry = PagemapEntry {
            vaddr: range.start(),
            compat_nr_pages: range.pages() as u32,
            in_parent: None,
            flags: Some(entry::PRESENT),
            nr_pages: Some(range.pages()),
        };
        image.record(&entry.encode_to_vec());
    }
    image.replace(dir, &name_of(space))
}

/// In pieces whose number of pages fits into 32 bits.
fn narrow(range: PageRange) -> impl Iterator<Item = PageRange> {
    let mut rest = Some(range);
    std::iter::from_fn(move || {
        let (now, later) = rest?.split(u32::MAX.into());
        rest = later;
        Some(now)
    })
}

fn name_of(space: Space) -> String {
    match space {
        Space::Process(vpid) => format!("pagemap-{vpid}.img"),
        Space::Shared(inode) => format!("pagemap-shmem-{inode}.img"),
    }
}
