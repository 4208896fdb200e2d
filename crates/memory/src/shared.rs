//! Memory that belongs to no process alone: anonymous shared memory, memfds
//! and SysV segments, object by object.
//!
//! Nothing tells what was written to such an object: it may be a process that
//! has ended, a write(2) to the memfd, or one that shares it from elsewhere. So
//! every round looks at every page, and compares its hash with that of what was
//! last read for sending. A page that changes between the two is named again by
//! the next round, whatever it changes to.
//!
//! The last look is part of the pause, so it takes what processors there are,
//! and reads objects where they are mapped here: hashing is then all it costs.
//! But only those that nobody can make shorter, because to touch what is not
//! there any more would end us by SIGBUS. The others, and all of them while the
//! container runs, are read with pread, which fills no hole either.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt},
        },
    },
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
    unistd::{Whence, lseek},
};
use transship_types::{ADDRESS_LIMIT, PAGE, PageRange, PageSet, Space};
use xxhash_rust::xxh3::xxh3_128;

use crate::{Dirty, MemoryError, maps, sys::view::View, tracker::Pids};

/// Read with one call: within the processor's second-level cache.
const CHUNK: u64 = 256 << 10;

/// What a thread takes at once to look through: far more work than taking it,
/// far less than there is to do where that matters.
const PIECE_PAGES: u64 = 1024;

/// Threads for the last look. Memory is not faster for more.
const THREADS: usize = 4;

/// Pages whose hashes are kept together, so that a sparse object of a terabyte
/// takes no more than what is in it.
const BLOCK: usize = 512;

/// The shared objects of a container.
pub struct SharedObjects {
    pids: Pids,
    /// The kernel's own file system, on which all of them are. A file of a
    /// container that only has such a name is on another.
    device: u64,
    objects: Mutex<BTreeMap<u64, Arc<Object>>>,
}

/// An object as one look has found it.
struct Found {
    object: Arc<Object>,
    name: Vec<u8>,
    /// Up to here its contents matter.
    reach: u64,
    /// Two of them have this inode.
    doubtful: bool,
}

struct Object {
    file: File,
    /// The name it has as a memfd, or is restored with as one.
    memfd: Option<Vec<u8>>,
    /// Nobody can make it shorter.
    fixed: bool,
    /// Made when it was first looked at, if it is fixed.
    view: OnceLock<Option<View>>,
    sent: Mutex<Hashes>,
}

/// How to look at objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Looking {
    /// One thread: the container needs the processor too.
    WhileItRuns,
    /// As fast as can be.
    InThePause,
}

/// What was last read of each page; absent or 0: nothing.
#[derive(Default)]
struct Hashes(BTreeMap<u64, Box<[u128; BLOCK]>>);

impl Hashes {
    fn of(&self, page: u64) -> u128 {
        let block = self.0.get(&(page / BLOCK as u64));
        block.map_or(0, |block| block[page as usize % BLOCK])
    }

    fn set(&mut self, page: u64, hash: u128) {
        let block = self.0.entry(page / BLOCK as u64).or_insert_with(|| Box::new([0; BLOCK]));
        block[page as usize % BLOCK] = hash;
    }
}

impl SharedObjects {
    /// `pids` is asked anew in every round.
    pub fn new(pids: Pids) -> Result<Self, MemoryError> {
        let device = memfd_create(c"transship", MFdFlags::MFD_CLOEXEC)
            .map_err(io::Error::from)
            .and_then(|own| File::from(own).metadata())
            .map_err(failed("finding the device of shared memory"))?
            .dev();
        Ok(Self { pids, device, objects: Mutex::default() })
    }

    /// What is not as it was when it was last read.
    pub fn round(&self) -> Result<Dirty, MemoryError> {
        Ok(self.look(Looking::WhileItRuns)?.0)
    }

    /// The same for the last time, and the pages that exist.
    pub fn last(&self) -> Result<(Dirty, Vec<(Space, PageSet)>), MemoryError> {
        self.look(Looking::InThePause)
    }

    fn look(&self, how: Looking) -> Result<(Dirty, Vec<(Space, PageSet)>), MemoryError> {
        let found = self.survey()?;
        let mut objects = Vec::new();
        for found in found.values() {
            let there = found.object.there(found.reach);
            objects.push((&*found.object, there.map_err(failed("looking at shared memory"))?));
        }
        let changed = changed(&objects, how).map_err(failed("looking at shared memory"))?;
        let spaces = || found.keys().map(|inode| Space::Shared(*inode));
        let dirty = Dirty { spaces: spaces().zip(changed).collect() };
        let present = objects.into_iter().map(|(_, there)| there);
        Ok((dirty, spaces().zip(present).collect()))
    }

    /// As [`crate::Memory::read`]; remembers what it has read.
    pub fn read(
        &self,
        object: u64,
        ranges: &[PageRange],
        mut into: &mut [u8],
    ) -> Result<Vec<PageRange>, MemoryError> {
        let found = self.objects().get(&object).cloned();
        let Some(found) = found else {
            into.fill(0);
            return Ok(ranges.to_vec());
        };
        let mut gone = Vec::new();
        for range in ranges {
            let (bytes, rest) = into.split_at_mut(range.bytes() as usize);
            gone.extend(found.read(*range, bytes).map_err(failed("reading shared memory"))?);
            into = rest;
        }
        Ok(gone)
    }

    /// As [`crate::Memory::memfd`].
    pub fn memfd(&self, object: u64) -> Option<Vec<u8>> {
        self.objects().get(&object).and_then(|object| object.memfd.clone())
    }

    /// Device and inode of those that the last look has found.
    pub fn names(&self) -> Vec<(u64, u64)> {
        self.objects().keys().map(|inode| (self.device, *inode)).collect()
    }

    /// Lets go of all of them.
    pub fn disarm(&self) {
        self.objects().clear();
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Object>>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The objects that somebody has mapped now.
    fn survey(&self) -> Result<BTreeMap<u64, Found>, MemoryError> {
        let before = self.objects().clone();
        let mut now: BTreeMap<u64, Found> = BTreeMap::new();
        for pid in (self.pids)().map_err(failed("listing the processes"))? {
            self.survey_process(pid, &before, &mut now).map_err(|source| MemoryError::Process {
                what: "finding the shared memory",
                pid,
                source,
            })?;
        }
        // SysV segments have their id for an inode, which another object may
        // have by chance. CRIU's images name objects by it alone: not ours.
        now.retain(|_, found| !found.doubtful);
        *self.objects() = now.iter().map(|(inode, f)| (*inode, f.object.clone())).collect();
        Ok(now)
    }

    fn survey_process(
        &self,
        pid: i32,
        before: &BTreeMap<u64, Arc<Object>>,
        now: &mut BTreeMap<u64, Found>,
    ) -> io::Result<()> {
        let text = match fs::read(format!("/proc/{pid}/maps")) {
            Err(error) if maps::gone(&error) => return Ok(()),
            text => text?,
        };
        for Mapping { range, inode, name, reach } in
            text.split(|&byte| byte == b'\n').filter_map(shared)
        {
            if let Some(found) = now.get_mut(&inode) {
                found.doubtful |= found.name != name;
                found.reach = found.reach.max(reach);
                continue;
            }
            let object = match before.get(&inode) {
                Some(known) => known.clone(),
                None => {
                    // Opened anew: its place in the file is nobody else's.
                    let file = match File::open(format!("/proc/{pid}/map_files/{range}")) {
                        // Unmapped meanwhile, or the process is gone.
                        Err(error) if maps::gone(&error) => continue,
                        file => file?,
                    };
                    let meta = file.metadata()?;
                    if meta.dev() != self.device || meta.ino() != inode {
                        continue;
                    }
                    Arc::new(Object::new(file)?)
                }
            };
            now.insert(inode, Found { object, name: name.to_vec(), reach, doubtful: false });
        }
        Ok(())
    }
}

/// A line of maps that may be one of them.
#[derive(Debug, PartialEq, Eq)]
struct Mapping<'a> {
    /// As map_files names it.
    range: &'a str,
    inode: u64,
    name: &'a [u8],
    /// What of the object CRIU restores on account of it.
    reach: u64,
}

/// `start-end perms offset device inode name`, see proc_pid_maps(5).
fn shared(line: &[u8]) -> Option<Mapping<'_>> {
    let mut fields = line.splitn(6, |&byte| byte == b' ');
    let mut field = || str::from_utf8(fields.next()?).ok();
    let (range, permissions, offset) = (field()?, field()?, field()?);
    let (_device, inode) = (field()?, field()?.parse().ok()?);
    let name = fields.next()?.trim_ascii_start();
    let anonymous = name.starts_with(b"/dev/zero");
    let ours = anonymous || [&b"/memfd:"[..], b"/SYSV"].iter().any(|n| name.starts_with(n));
    if !permissions.ends_with('s') || !ours || !name.ends_with(b" (deleted)") {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let [start, end, offset] = [start, end, offset].map(|hex| u64::from_str_radix(hex, 16).ok());
    // Nobody can get at the rest of an anonymous object any more, and CRIU
    // makes it only as large as it is mapped. The others have a size.
    let mapped = offset?.saturating_add(end?.saturating_sub(start?));
    let reach = if anonymous { mapped } else { ADDRESS_LIMIT };
    Some(Mapping { range, inode, name, reach })
}

/// What of each object is not as it was sent, in their order.
fn changed(objects: &[(&Object, PageSet)], how: Looking) -> io::Result<Vec<PageSet>> {
    let mut pieces = Vec::new();
    for (index, (_, there)) in objects.iter().enumerate() {
        for extent in there.iter() {
            let mut left = Some(extent);
            while let Some((piece, rest)) = left.map(|range| range.split(PIECE_PAGES)) {
                pieces.push((index, piece));
                left = rest;
            }
        }
    }
    let next = AtomicUsize::new(0);
    let work = || -> io::Result<Vec<(usize, PageSet)>> {
        let mut buffer = vec![0; CHUNK as usize];
        let mut found = Vec::new();
        while let Some(&(index, piece)) = pieces.get(next.fetch_add(1, Relaxed)) {
            let changed = objects[index].0.changed(piece, how, &mut buffer)?;
            if !changed.is_empty() {
                found.push((index, changed));
            }
        }
        Ok(found)
    };
    let threads = match how {
        Looking::WhileItRuns => 1,
        Looking::InThePause => thread::available_parallelism().map_or(1, |n| n.get().min(THREADS)),
    };
    let mut all = vec![PageSet::new(); objects.len()];
    thread::scope(|scope| {
        let others = 1..threads.min(pieces.len());
        let others: Vec<_> = others.map(|_| scope.spawn(work)).collect();
        let own = work();
        let others =
            others.into_iter().map(|o| o.join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
        for found in std::iter::once(own).chain(others) {
            found?.iter().for_each(|(index, changed)| all[*index].extend(changed));
        }
        Ok(all)
    })
}

impl Object {
    fn new(file: File) -> io::Result<Self> {
        // maps would show some characters in another way.
        let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into_os_string();
        let link = link.as_bytes().strip_suffix(b" (deleted)").unwrap_or(link.as_bytes());
        let name = link.strip_prefix(b"/memfd:");
        // CRIU restores anonymous memory as a memfd too, and calls that as the
        // kernel calls the memory. A SysV segment stays one.
        let memfd = name.or((link == b"/dev/zero").then_some(link)).map(<[u8]>::to_owned);
        let fixed = name.is_none() || {
            let seals = fcntl(&file, FcntlArg::F_GET_SEALS).unwrap_or(0);
            SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK)
        };
        let (view, sent) = (OnceLock::new(), Mutex::default());
        Ok(Self { file, memfd, fixed, view, sent })
    }

    fn sent(&self) -> MutexGuard<'_, Hashes> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages that exist up to `reach`.
    fn there(&self, reach: u64) -> io::Result<PageSet> {
        let (mut there, mut at) = (PageSet::new(), 0);
        while let Some(extent) = self.extent(at)? {
            at = extent.end();
            let Ok(extent) = PageRange::new(extent.start(), at.min(reach)) else { break };
            there.insert(extent);
        }
        Ok(there)
    }

    /// Those pages of a range of existing ones that are not as they were sent.
    fn changed(&self, range: PageRange, how: Looking, buffer: &mut [u8]) -> io::Result<PageSet> {
        let view = self.view().filter(|view| view.has(range));
        if how == Looking::WhileItRuns
            && let Some(view) = view
        {
            view.find(range);
        }
        let mut changed = PageSet::new();
        let mut left = Some(range);
        while let Some((now, rest)) = left.map(|range| range.split(CHUNK / PAGE)) {
            left = rest;
            let bytes = &mut buffer[..now.bytes() as usize];
            match view.filter(|_| how == Looking::InThePause) {
                Some(view) => view.read(now, bytes),
                None => _ = fill(&self.file, now.start(), bytes)?,
            }
            let hashes: Vec<_> = bytes.chunks(PAGE as usize).map(hash).collect();
            let sent = self.sent();
            let pages = (now.start()..).step_by(PAGE as usize).zip(hashes);
            let differ = pages.filter(|(start, hash)| *hash != sent.of(start / PAGE));
            // One page of a range that was checked.
            changed.extend(
                &differ.filter_map(|(start, _)| PageRange::of_pages(start, 1).ok()).collect(),
            );
        }
        Ok(changed)
    }

    fn view(&self) -> Option<&View> {
        let make = || {
            let bytes = self.file.metadata().ok()?.len();
            // One that cannot be mapped is read.
            View::of(&self.file, bytes).ok()
        };
        self.view.get_or_init(|| self.fixed.then(make).flatten()).as_ref()
    }

    /// The next run of pages that exist, from `at` on. Swapped ones do.
    fn extent(&self, at: u64) -> io::Result<Option<PageRange>> {
        let seek = |at: u64, whence| match lseek(&self.file, at as i64, whence) {
            Ok(found) => Ok(Some(found as u64)),
            // Nothing behind it, or it has become shorter than that.
            Err(Errno::ENXIO) => Ok(None),
            Err(error) => Err(io::Error::from(error)),
        };
        let Some(start) = seek(at, Whence::SeekData)? else { return Ok(None) };
        let start = start / PAGE * PAGE;
        let end = seek(start, Whence::SeekHole)?.unwrap_or(start + PAGE);
        let end = end.next_multiple_of(PAGE).max(start + PAGE);
        // An offset that is no page address would be an object beyond any
        // machine's memory.
        let range = PageRange::new(start, end.min(ADDRESS_LIMIT));
        range.map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }

    /// Answers what is beyond its end.
    fn read(&self, range: PageRange, into: &mut [u8]) -> io::Result<Option<PageRange>> {
        let read = fill(&self.file, range.start(), into)?;
        let hashes: Vec<_> = into[..read].chunks(PAGE as usize).map(hash).collect();
        let mut sent = self.sent();
        for (page, hash) in (range.start() / PAGE..).zip(hashes) {
            sent.set(page, hash);
        }
        // A last page that is half beyond the end is still a page.
        let end = range.start() + (read as u64).next_multiple_of(PAGE);
        Ok(PageRange::new(end, range.end()).ok())
    }
}

/// Never 0, which says that nothing was read.
fn hash(page: &[u8]) -> u128 {
    xxh3_128(page).max(1)
}

/// Reads up to the end of the file; the rest becomes zero.
fn fill(file: &File, start: u64, into: &mut [u8]) -> io::Result<usize> {
    let mut read = 0;
    while read < into.len() {
        match file.read_at(&mut into[read..], start + read as u64) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    into[read..].fill(0);
    Ok(read)
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> MemoryError {
    move |source| MemoryError::System { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(bytes: u64) -> Object {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        Object::new(file).unwrap()
    }

    impl Object {
        /// What there is, and what of it has changed; in both ways the same.
        fn look(&self, reach: u64) -> io::Result<(PageSet, PageSet)> {
            let there = self.there(reach)?;
            let objects = [(self, there)];
            let [running, pause] = [Looking::WhileItRuns, Looking::InThePause].map(|how| {
                let mut all = changed(&objects, how)?;
                Ok::<_, io::Error>(all.remove(0))
            });
            let (running, [(_, there)]) = (running?, objects);
            assert_eq!(running, pause?);
            Ok((there, running))
        }
    }

    #[test]
    fn a_memfd_tells_its_name() {
        for name in [c"", c"with space", c"new\nline", c"x (deleted)", c"/memfd:y", c"/dev/zero"] {
            let object = Object::new(memfd_create(name, MFdFlags::empty()).unwrap().into());
            let object = object.unwrap();
            assert_eq!((object.memfd.as_deref(), object.fixed), (Some(name.to_bytes()), false));
        }
    }

    /// The others could end us while we look at them.
    #[test]
    fn what_cannot_shrink_is_looked_at_where_it_is() {
        let flags = MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"sealed", flags).unwrap());
        file.set_len(3000 * PAGE).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        let object = Object::new(file).unwrap();
        let written = [0, 1, 5, 1023, 1024, 2999];
        written.iter().for_each(|page| write(&object, *page, 1));
        let there: PageSet = written.iter().map(|&page| range(page, page + 1)).collect();
        assert_eq!(object.look(ADDRESS_LIMIT).unwrap(), (there.clone(), there.clone()));
        assert!(object.view().is_some());
        take(&object, &there);
        [1, 1024, 2000].iter().for_each(|page| write(&object, *page, 2));
        let changed = set(&[(1, 2), (1024, 1025), (2000, 2001)]);
        assert_eq!(object.look(ADDRESS_LIMIT).unwrap().1, changed);
        // Longer than it is mapped.
        object.file.set_len(4000 * PAGE).unwrap();
        write(&object, 3500, 3);
        assert!(object.look(ADDRESS_LIMIT).unwrap().1.contains(3500 * PAGE));
        assert_eq!(object.file.metadata().unwrap().blocks() * 512, 8 * PAGE, "no hole is filled");
    }

    fn range(first: u64, last: u64) -> PageRange {
        PageRange::new(first * PAGE, last * PAGE).unwrap()
    }

    fn set(ranges: &[(u64, u64)]) -> PageSet {
        ranges.iter().map(|&(first, last)| range(first, last)).collect()
    }

    fn write(object: &Object, page: u64, byte: u8) {
        object.file.write_all_at(&[byte], page * PAGE + 77).unwrap();
    }

    fn take(object: &Object, pages: &PageSet) {
        for range in pages.iter() {
            object.read(range, &mut vec![0; range.bytes() as usize]).unwrap();
        }
    }

    #[test]
    fn lines_of_maps_that_may_be_shared_objects() {
        let far = ADDRESS_LIMIT;
        for (line, found) in [
            ("7f00-7f10 rw-s 00001000 00:01 99      /dev/zero (deleted)", Some((99, 0x1010))),
            ("7f00-7f10 r--s 00001000 00:01 98      /memfd:with space (deleted)", Some((98, far))),
            ("7f00-7f10 rw-s 00000000 00:01 97      /SYSV0052e2c1 (deleted)", Some((97, far))),
            ("7f00-7f10 rw-p 00000000 00:01 96      /memfd:private (deleted)", None),
            ("7f00-7f10 rw-s 00000000 fe:00 95      /data/file", None),
            ("7f00-7f10 rw-s 00000000 fe:00 94      /dev/zero", None),
            ("7f00-7f10 rw-p 00000000 00:00 0 ", None),
            ("", None),
        ] {
            let seen = shared(line.as_bytes()).map(|mapping| (mapping.inode, mapping.reach));
            assert_eq!(seen, found, "{line}");
        }
    }

    #[test]
    fn holes_are_not_there_and_stay_holes() {
        let object = object(1 << 40);
        for page in [0, 1, 5, 700, 1 << 27] {
            write(&object, page, 1);
        }
        let there = set(&[(0, 2), (5, 6), (700, 701), (1 << 27, (1 << 27) + 1)]);
        assert_eq!(object.look(ADDRESS_LIMIT).unwrap(), (there.clone(), there.clone()));
        take(&object, &set(&[(0, 10), (690, 710)]));
        let far = set(&[(1 << 27, (1 << 27) + 1)]);
        assert_eq!(object.look(ADDRESS_LIMIT).unwrap(), (there, far));
        assert_eq!(object.file.metadata().unwrap().blocks() * 512, 5 * PAGE);
    }

    #[test]
    fn what_differs_from_what_was_read_is_named() {
        let object = object(100 * PAGE);
        for page in 0..100 {
            write(&object, page, 1);
        }
        take(&object, &set(&[(0, 100)]));
        assert!(object.look(ADDRESS_LIMIT).unwrap().1.is_empty());
        write(&object, 3, 2);
        write(&object, 50, 2);
        assert_eq!(object.look(ADDRESS_LIMIT).unwrap().1, set(&[(3, 4), (50, 51)]));
        // Written again before it is read, and back to what it was after.
        write(&object, 3, 3);
        take(&object, &set(&[(3, 4), (50, 51)]));
        write(&object, 3, 2);
        assert_eq!(object.look(ADDRESS_LIMIT).unwrap().1, set(&[(3, 4)]));
        // Nobody read it in between: the target still has what it holds now.
        write(&object, 3, 3);
        assert!(object.look(ADDRESS_LIMIT).unwrap().1.is_empty());
    }

    #[test]
    fn an_object_may_shrink_at_any_time() {
        let object = object(10 * PAGE);
        (0..10).for_each(|page| write(&object, page, 1));
        object.file.set_len(4 * PAGE + 100).unwrap();
        let mut bytes = vec![9; 6 * PAGE as usize];
        assert_eq!(object.read(range(2, 8), &mut bytes).unwrap(), Some(range(5, 8)));
        assert!(bytes[3 * PAGE as usize..].iter().all(|byte| *byte == 0));
        assert_eq!(object.read(range(8, 10), &mut bytes[..8192]).unwrap(), Some(range(8, 10)));
        assert_eq!(object.look(ADDRESS_LIMIT).unwrap().0, set(&[(0, 5)]));
        object.file.set_len(0).unwrap();
        assert_eq!(object.look(ADDRESS_LIMIT).unwrap(), Default::default());
    }

    /// Not a test but a measurement:
    /// `cargo test --release -p transship-memory shared -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement, which proves nothing on a busy machine"]
    fn speed() {
        const PAGES: u64 = 1 << 17;
        for seals in [SealFlag::empty(), SealFlag::F_SEAL_SHRINK] {
            let file = File::from(memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
            file.write_all_at(&vec![7; (PAGES * PAGE) as usize], 0).unwrap();
            fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
            let object = Object::new(file).unwrap();
            let objects = [(&object, object.there(ADDRESS_LIMIT).unwrap())];
            take(&object, &objects[0].1);
            for how in [Looking::WhileItRuns, Looking::InThePause, Looking::InThePause] {
                let begin = std::time::Instant::now();
                assert!(changed(&objects, how).unwrap()[0].is_empty());
                let rate = (PAGES * PAGE) as f64 / begin.elapsed().as_secs_f64() / 1e9;
                println!("{seals:?} {how:?}: {rate:.2} GB/s");
            }
        }
    }
}
