//! Where pages wait that come by lane: those of processes in the store, those
//! of shared objects in a file per object, each page in its place.
//!
//! For an object that is a memfd that file is the object which the processes
//! will have: CRIU is given it, and nothing is left to do in the pause.
//! Anything else CRIU restores whole, from an image: then the file lies in the
//! directory of the images, and becomes that image by its name. Copying it
//! together from the store would be part of the pause, a second per GiB.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ffi::CString,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{
    fcntl::{FallocateFlags, fallocate},
    sys::memfd::{MFdFlags, memfd_create},
};
use transship_criu::images::MemoryDir;
use transship_memory::{MemoryError, Store};
use transship_migration::{PageStore, pages::PageSink};
use transship_types::{PAGE, PageRange, PageSet, Space};

pub struct Incoming {
    store: Arc<Store>,
    images: Arc<MemoryDir>,
    limit_bytes: u64,
    objects: Mutex<BTreeMap<u64, Object>>,
}

struct Object {
    file: File,
    /// Not among the images.
    is_memfd: bool,
    /// Pages that have come.
    known: PageSet,
}

/// Its file's name among the images. A peer that sends an image of that name
/// is refused: there is a file already.
pub fn name_of(inode: u64) -> String {
    format!("transship-shared-{inode}")
}

impl Incoming {
    pub fn new(store: Arc<Store>, images: Arc<MemoryDir>, limit_bytes: u64) -> Self {
        Self { store, images, limit_bytes, objects: Mutex::default() }
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<u64, Object>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The objects that are memfds. They are here no more, so that none of
    /// them is kept beyond its processes.
    pub fn memfds(&self) -> BTreeMap<u64, File> {
        let mut objects = self.objects();
        let (memfds, others) =
            std::mem::take(&mut *objects).into_iter().partition(|(_, object)| object.is_memfd);
        *objects = others;
        let memfds: BTreeMap<u64, Object> = memfds;
        memfds.into_iter().map(|(inode, object)| (inode, object.file)).collect()
    }

    /// Works on an object, whose pages are then no more than there is room for.
    fn with<T>(
        &self,
        inode: u64,
        ranges: &[PageRange],
        work: impl FnOnce(&File) -> io::Result<T>,
    ) -> Result<T, MemoryError> {
        let mut objects = self.objects();
        let object = match objects.entry(inode) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let name = name_of(inode);
                let file = self.images.create_file(&name).map_err(|error| MemoryError::System {
                    what: "making a file for a shared object",
                    source: io::Error::other(error),
                })?;
                place.insert(Object { file, is_memfd: false, known: PageSet::new() })
            }
        };
        ranges.iter().for_each(|range| object.known.insert(*range));
        let done = work(&object.file).map_err(failed)?;
        let pages: u64 = objects.values().map(|object| object.known.pages()).sum();
        if pages.saturating_mul(PAGE).saturating_add(self.store.bytes()) > self.limit_bytes {
            return Err(MemoryError::Full { limit_bytes: self.limit_bytes });
        }
        Ok(done)
    }
}

impl PageSink for Incoming {
    fn put(
        &self,
        space: Space,
        ranges: &[PageRange],
        bytes: &[u8],
        round: u32,
    ) -> Result<(), MemoryError> {
        let Space::Shared(inode) = space else {
            return self.store.put(space, ranges, bytes, round);
        };
        let length = ranges.iter().map(|range| range.bytes()).sum::<u64>();
        if length != bytes.len() as u64 {
            let text = format!("{} bytes came for {length} of pages of {space}", bytes.len());
            return Err(MemoryError::Invalid(text));
        }
        self.with(inode, ranges, |file| {
            let mut rest = bytes;
            for range in ranges {
                let (these, others) = rest.split_at(range.bytes() as usize);
                file.write_all_at(these, range.start())?;
                rest = others;
            }
            Ok(())
        })
    }

    fn memfd(&self, object: u64, name: &[u8]) -> Result<(), MemoryError> {
        if let Entry::Vacant(place) = self.objects().entry(object) {
            let making = |source| MemoryError::System { what: "making a shared object", source };
            let name = CString::new(name).map_err(|error| making(error.into()))?;
            // What the images say of seals is made true before it runs.
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let file = memfd_create(&*name, flags).map_err(|error| making(error.into()))?.into();
            place.insert(Object { file, is_memfd: true, known: PageSet::new() });
        }
        Ok(())
    }

    fn zero(&self, space: Space, ranges: &[PageRange], round: u32) -> Result<(), MemoryError> {
        match space {
            Space::Process(_) => self.store.zero(space, ranges, round),
            Space::Shared(inode) => self.with(inode, ranges, |file| {
                ranges.iter().try_for_each(|range| punch(file, *range))
            }),
        }
    }
}

impl PageStore for Incoming {
    fn present(&self, space: Space, pages: &PageSet) -> Result<(), MemoryError> {
        let Space::Shared(inode) = space else { return self.store.present(space, pages) };
        let mut objects = self.objects();
        let none = PageSet::new();
        let known = objects.get(&inode).map_or(&none, |object| &object.known);
        let mut missing = pages.clone();
        missing.subtract(known);
        if let Some(range) = missing.iter().next() {
            return Err(MemoryError::Missing { space, address: range.start() });
        }
        if let Some(object) = objects.get_mut(&inode) {
            let mut gone = std::mem::replace(&mut object.known, pages.clone());
            gone.subtract(pages);
            gone.iter().try_for_each(|range| punch(&object.file, range)).map_err(failed)?;
        }
        Ok(())
    }

    fn expect(&self, space: Space, pages: &PageSet) -> Result<u64, MemoryError> {
        match space {
            Space::Process(_) => self.store.expect(space, pages),
            // Restored whole: nothing of it can follow.
            Space::Shared(_) => self.present(space, pages).map(|()| 0),
        }
    }

    fn missing(&self, space: Space) -> PageSet {
        self.store.missing(space)
    }

    fn lacking(&self, space: Space, within: PageRange) -> Vec<PageRange> {
        self.store.lacking(space, within)
    }

    fn spaces(&self) -> Vec<Space> {
        let mut spaces = self.store.spaces();
        spaces.extend(self.objects().keys().map(|inode| Space::Shared(*inode)));
        spaces
    }
}

/// Makes it zero, and takes no memory for it.
fn punch(file: &File, range: PageRange) -> io::Result<()> {
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    // Below the limit on addresses, which is far below that of an offset.
    Ok(fallocate(file, how, range.start() as i64, range.bytes() as i64)?)
}

fn failed(source: io::Error) -> MemoryError {
    MemoryError::System { what: "keeping pages of a shared object", source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED: Space = Space::Shared(7);

    fn pages(first: u64, last: u64) -> PageRange {
        PageRange::new(first * PAGE, last * PAGE).unwrap()
    }

    fn set(first: u64, last: u64) -> PageSet {
        [pages(first, last)].into_iter().collect()
    }

    #[test]
    fn an_object_lies_in_its_file_as_it_is() {
        let images = Arc::new(MemoryDir::create(None).unwrap());
        let store = Arc::new(Store::new(1 << 30));
        let incoming = Incoming::new(store.clone(), images.clone(), 8 * PAGE);
        let two = [[1; PAGE as usize], [2; PAGE as usize]].concat();
        incoming.put(SHARED, &[pages(0, 1), pages(3, 4)], &two, 1).unwrap();
        incoming.put(Space::Process(1), &[pages(0, 2)], &two, 1).unwrap();
        assert_eq!(incoming.spaces(), [Space::Process(1), SHARED]);
        assert_eq!(store.spaces(), [Space::Process(1)]);
        let byte = |page: u64| {
            let mut byte = [9];
            let file = images.open(&name_of(7)).unwrap();
            file.read_exact_at(&mut byte, page * PAGE).unwrap();
            byte[0]
        };
        assert_eq!([0, 1, 3].map(byte), [1, 0, 2]);
        incoming.zero(SHARED, &[pages(0, 1)], 2).unwrap();
        assert_eq!([0, 1, 3].map(byte), [0, 0, 2]);

        let missing = incoming.present(SHARED, &set(2, 4)).unwrap_err();
        assert!(matches!(missing, MemoryError::Missing { address: 0x2000, .. }), "{missing}");
        incoming.present(SHARED, &set(0, 1)).unwrap();
        assert_eq!([0, 3].map(byte), [0, 0], "what is gone is forgotten");
        assert!(incoming.present(Space::Shared(8), &set(0, 1)).is_err());

        assert!(incoming.put(SHARED, &[pages(0, 1)], &two, 1).is_err(), "the wrong length");
        let full = incoming.zero(SHARED, &[pages(10, 20)], 3);
        assert!(matches!(full, Err(MemoryError::Full { .. })), "{full:?}");
    }
}
