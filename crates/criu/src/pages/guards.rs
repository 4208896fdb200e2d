//! Guard regions (`MADV_GUARD_INSTALL`), which glibc puts under thread stacks.
//!
//! CRIU finds them by the pagemap too. What hides pages from it hides them, so
//! we find them ourselves, while the container is frozen, and add them to
//! CRIU's image of the mappings the way CRIU does.

use std::{fs::File, io};

use prost::Message;
use transship_types::{ADDRESS_LIMIT, PAGE, PageRange, PageSet};

use super::{
    PagesError,
    image::{Image, MmEntry, Type, VmaEntry, Writer},
};
use crate::{CriuError, images::MemoryDir, sys};

/// x86-64 keeps the very last page to itself and refuses a scan over it.
const LAST: u64 = ADDRESS_LIMIT - PAGE;

/// The guard regions of a process, by its id here; none where the kernel
/// cannot tell (then CRIU would not have found them either). Walks all page
/// tables: about a millisecond per GiB, so do it beside CRIU's dump.
pub fn guards(pid: i32) -> Result<PageSet, CriuError> {
    let path = format!("/proc/{pid}/pagemap");
    let find = || -> io::Result<PageSet> {
        let pagemap = File::open(&path)?;
        let mut found = PageSet::new();
        let mut at = 0;
        while at < LAST {
            let Some((regions, walked)) = sys::scan_guards(&pagemap, at, LAST)? else {
                break;
            };
            found.extend(&regions.into_iter().collect());
            at = walked;
        }
        Ok(found)
    };
    find().map_err(CriuError::file("scanning", &path))
}

/// Adds guard regions to `mm-VPID.img`; those it has already stay.
pub fn add_guards(dir: &MemoryDir, vpid: u32, guards: &PageSet) -> Result<(), PagesError> {
    let name = format!("mm-{vpid}.img");
    let Some(image) = Image::read(dir, name.clone(), Type::Mm)? else { return Ok(()) };
    let mm: MmEntry = image.only(dir)?;
    let known: PageSet = mm
        .vmas
        .iter()
        .filter(|vma| vma.is_guard())
        .filter_map(|vma| PageRange::new(vma.start, vma.end).ok())
        .collect();
    let mut missing = guards.clone();
    missing.subtract(&known);
    if missing.is_empty() {
        return Ok(());
    }
    let Some(Ok(record)) = image.records().next() else {
        return Err(image.bad(dir, "its record cannot be read"));
    };
    // Our `MmEntry` knows one field of many, so the record stays as it is. A
    // message may be continued behind its end, and guards must stand last.
    let more = MmEntry { vmas: missing.iter().map(VmaEntry::guard).collect() };
    let mut writer = Writer::new(Type::Mm);
    writer.record(&[record, &more.encode_to_vec()].concat());
    writer.replace(dir, &name)
}
