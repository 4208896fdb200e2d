//! What a target of a migration would have, kept as simply as possible, and
//! what there really is, found without the tracker.

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt};

use transship_memory::{Dirty, Memory, Tracker};
use transship_types::{PAGE, PageRange, PageSet, Space};

type Page = Box<[u8]>;

#[derive(Default, Clone)]
pub struct Store(BTreeMap<(Space, u64), Page>);

impl Store {
    pub fn take(&mut self, tracker: &Tracker, dirty: &Dirty) {
        for (space, pages) in &dirty.spaces {
            for range in pages.iter() {
                let mut bytes = vec![0; range.bytes() as usize];
                let gone = tracker.read(*space, &[range], &mut bytes).unwrap();
                for (page, bytes) in pages_of(range).zip(bytes.chunks(PAGE as usize)) {
                    if gone.iter().all(|gone| !gone.contains(page)) {
                        self.0.insert((*space, page), bytes.into());
                    }
                }
            }
        }
    }

    /// While the processes stand still: everything that is there has arrived,
    /// as it is now. The store itself stays as it was.
    pub fn check(&self, tracker: &Tracker) {
        let last = tracker.last().unwrap();
        let spaces = tracker.spaces();
        assert_eq!(spaces.len(), last.present.len());
        let present = |space| &last.present.iter().find(|(named, _)| *named == space).unwrap().1;
        // Before anything is read: that can bring pages back from where they
        // are.
        for &(space, pid) in &spaces {
            let (mut missing, mut more) = (own_pages(pid), present(space).clone());
            more.subtract(&missing);
            missing.subtract(present(space));
            assert!(missing.is_empty(), "{missing:x?} of {space} are not named");
            // The kernel makes pages of zeroes of what it finds unused in a
            // huge page; what is known of them still holds.
            let zero = |page| entry(pid, page) & FRAME == zero_page();
            assert!(more.iter().flat_map(pages_of).all(zero), "{more:x?} of {space} are named");
        }
        let mut here = self.clone();
        here.take(tracker, &last.dirty);
        for (space, pid) in spaces {
            let present = present(space);
            let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
            let mut real = vec![0; PAGE as usize];
            for page in present.iter().flat_map(pages_of) {
                memory.read_exact_at(&mut real, page).unwrap();
                let arrived = here.0.get(&(space, page));
                let arrived = arrived.unwrap_or_else(|| panic!("{page:#x} of {space} is missing"));
                assert!(**arrived == *real, "{page:#x} of {space} is not what it was");
            }
        }
    }
}

pub fn pages_of(range: PageRange) -> impl Iterator<Item = u64> {
    (range.start()..range.end()).step_by(PAGE as usize)
}

/// Where a page is, in an entry of a pagemap.
const FRAME: u64 = (1 << 55) - 1;

fn entry(pid: i32, page: u64) -> u64 {
    let mut entry = [0; 8];
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    pagemap.read_exact_at(&mut entry, page / PAGE * 8).unwrap();
    u64::from_le_bytes(entry)
}

/// The pages that belong to a process alone, by the entries of its pagemap.
fn own_pages(pid: i32) -> PageSet {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let mut own = PageSet::new();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (range, permissions) = (fields.next().unwrap(), fields.next().unwrap());
        let name = fields.nth(3).unwrap_or_default();
        if permissions.ends_with('s') || name.starts_with("[v") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let address = |hex| u64::from_str_radix(hex, 16).unwrap();
        let range = PageRange::new(address(start), address(end)).unwrap();
        let mut entries = vec![0; (range.pages() * 8) as usize];
        pagemap.read_exact_at(&mut entries, range.start() / PAGE * 8).unwrap();
        for (page, entry) in pages_of(range).zip(entries.chunks(8)) {
            let entry = u64::from_le_bytes(entry.try_into().unwrap());
            let (present, swapped, file) = (entry >> 63 & 1, entry >> 62 & 1, entry >> 61 & 1);
            let zero = present == 1 && entry & FRAME == zero_page();
            if present + swapped > 0 && file == 0 && !zero {
                own.insert(PageRange::of_pages(page, 1).unwrap());
            }
        }
    }
    own
}

/// Where the kernel keeps the page of zeroes: behind one that we never wrote.
fn zero_page() -> u64 {
    static ZEROES: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *ZEROES.get_or_init(|| {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = crate::sys::map(1, libc::PROT_READ, anonymous, -1).unwrap();
        crate::sys::look(at, 1);
        entry(std::process::id() as i32, at as u64) & FRAME
    })
}
