//! What CRIU will do with each mapping.

use std::collections::HashSet;

use prost::Message;
use transship_types::{PAGE, PageRange, PageSet};

use super::{
    PagesError,
    image::{CoreEntry, Image, MmEntry, PstreeEntry, Type, VmaEntry},
};
use crate::images::MemoryDir;

/// Of madvise(2).
const WIPE_ON_FORK: u32 = 18;

/// The kernel's limit on process ids.
const MAX_PROCESSES: usize = 1 << 22;

/// `status` of a mapping in CRIU's images (criu/include/image.h).
mod status {
    pub const REGULAR: u32 = 1 << 0;
    pub const VSYSCALL: u32 = 1 << 2;
    pub const VDSO: u32 = 1 << 3;
    pub const FILE_PRIVATE: u32 = 1 << 6;
    pub const ANON_PRIVATE: u32 = 1 << 9;
    pub const VVAR: u32 = 1 << 12;
    pub const AIO_RING: u32 = 1 << 13;
    pub const MEMFD: u32 = 1 << 14;
    pub const SHADOW_STACK: u32 = 1 << 15;
    pub const GUARD: u32 = 1 << 16;
}

/// Flags of mmap(2), the same on x86-64 and arm64.
mod flag {
    pub const SHARED: u32 = 0x01;
    pub const PRIVATE: u32 = 0x02;
    pub const ANONYMOUS: u32 = 0x20;
    pub const LOCKED: u32 = 0x2000;
    pub const HUGETLB: u32 = 0x40000;
}

/// Of mmap(2).
const PROT_WRITE: u32 = 0x2;
/// `O_ACCMODE` of open(2); 0 is for reading only.
const ACCESS_MODE: u32 = 0x3;

/// The memory of one process as CRIU will map it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessLayout {
    pub vpid: u32,
    /// In order, without what the kernel alone maps.
    pub vmas: Vec<Vma>,
    /// The pages its threads' stack pointers are in: restored eagerly even in
    /// a lazy mapping, as CRIU does.
    pub stacks: PageSet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vma {
    pub range: PageRange,
    /// Filled through userfaultfd, when CRIU is asked for lazy pages.
    pub lazy: bool,
    /// Its pages are in the process's own pagemap image.
    pub private: bool,
}

/// Every process that has memory; a zombie has none.
pub fn layout(dir: &MemoryDir) -> Result<Vec<ProcessLayout>, PagesError> {
    let name = "pstree.img".to_owned();
    let Some(tree) = Image::read(dir, name.clone(), Type::Pstree)? else {
        return Err(PagesError::Image { path: dir.path().join(name), why: "it is missing" });
    };
    let mut layouts = Vec::new();
    // A few bytes each, and whole images to be read for them.
    let (mut processes, mut threads) = (HashSet::new(), HashSet::new());
    for record in tree.records().take(MAX_PROCESSES) {
        let record = record.map_err(|why| tree.bad(dir, why))?;
        let entry =
            PstreeEntry::decode(record).map_err(|_| tree.bad(dir, "a process cannot be read"))?;
        if !processes.insert(entry.pid) || !entry.threads.iter().all(|&id| threads.insert(id)) {
            return Err(tree.bad(dir, "a process or a thread is there twice"));
        }
        layouts.extend(of_process(dir, &entry)?);
    }
    Ok(layouts)
}

fn of_process(dir: &MemoryDir, entry: &PstreeEntry) -> Result<Option<ProcessLayout>, PagesError> {
    let vpid = entry.pid;
    let Some(image) = Image::read(dir, format!("mm-{vpid}.img"), Type::Mm)? else {
        return Ok(None);
    };
    let mm: MmEntry = image.only(dir)?;
    let mut vmas = Vec::with_capacity(mm.vmas.len());
    for vma in mm.vmas.iter().filter(|vma| !vma.is(status::GUARD) && !vma.is(status::VSYSCALL)) {
        let range = PageRange::new(vma.start, vma.end)
            .map_err(|_| image.bad(dir, "a mapping is no range of pages"))?;
        vmas.push(Vma { range, lazy: vma.is_lazy(), private: vma.is_private() });
    }
    if !vmas.windows(2).all(|pair| pair[0].range.end() <= pair[1].range.start()) {
        return Err(image.bad(dir, "its mappings are not in order"));
    }
    let mut stacks = PageSet::new();
    for thread in &entry.threads {
        let Some(core) = Image::read(dir, format!("core-{thread}.img"), Type::Core)? else {
            continue;
        };
        let pointer = core.only::<CoreEntry>(dir)?.stack_pointer().unwrap_or_default();
        // Whatever a thread has in that register: an address or not.
        if let Ok(page) = PageRange::of_pages(pointer / PAGE * PAGE, 1) {
            stacks.insert(page);
        }
    }
    Ok(Some(ProcessLayout { vpid, vmas, stacks }))
}

/// CRIU's own rules (`vma_entry_is_private` and `vma_entry_can_be_lazy` in
/// criu/include/vma.h, the same in 4.1 and 4.2), but for what a child must not
/// see.
impl VmaEntry {
    fn is(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    fn is_private(&self) -> bool {
        let regular = self.is(status::REGULAR)
            && (self.is(status::ANON_PRIVATE) || self.is(status::FILE_PRIVATE));
        regular || self.is(status::SHADOW_STACK) || self.is(status::AIO_RING)
    }

    fn is_lazy(&self) -> bool {
        let anonymous = self.flags & flag::ANONYMOUS != 0 && self.flags & flag::PRIVATE != 0;
        let eager = self.flags & (flag::LOCKED | flag::HUGETLB) != 0;
        let special = self.is(status::VDSO) || self.is(status::VVAR);
        // CRIU copies a shadow stack before it is registered. It would copy
        // pages that have not come yet.
        let criu = anonymous && !eager && !special && !self.is(status::SHADOW_STACK);
        criu && self.is_private() && !self.is_wiped_on_fork()
    }

    /// A child must find zeros there. It inherits userfaultfd with the mapping
    /// all the same, and would get what its parent still waits for. CRIU
    /// restores pages that are in the image wherever they belong.
    fn is_wiped_on_fork(&self) -> bool {
        self.madv.unwrap_or_default() >> WIPE_ON_FORK & 1 == 1
    }

    /// A region inside other mappings, as CRIU writes it.
    pub(super) fn guard(range: PageRange) -> Self {
        Self {
            start: range.start(),
            end: range.end(),
            status: status::GUARD,
            fd: -1,
            ..Default::default()
        }
    }

    pub(super) fn is_guard(&self) -> bool {
        self.is(status::GUARD)
    }

    /// Its status says that what is mapped is a memfd, or anonymous shared
    /// memory, and `shmid` names the open file.
    pub(super) const MEMFD: u32 = status::MEMFD;

    pub(super) fn is_memfd(&self) -> bool {
        self.is(status::MEMFD)
    }

    pub(super) fn is_shared(&self) -> bool {
        self.flags & flag::SHARED != 0
    }

    /// As CRIU guesses it where its image does not say.
    pub(super) fn is_of_writable_file(&self) -> bool {
        let guess = self.prot & PROT_WRITE != 0 && self.is_shared();
        self.fdflags.map_or(guess, |flags| flags & ACCESS_MODE != 0)
    }
}
