//! The framing of CRIU's images, and the parts of them we read.
//!
//! `u32 common magic, u32 type, (u32 length, protobuf message)*`, in the order
//! of bytes of the machine that wrote them, which is little-endian on all that
//! we run on.

use std::io::{Read, Write};

use prost::{
    Message,
    encoding::{DecodeContext, decode_key, skip_field},
};

use super::PagesError;
use crate::{CriuError, images::MemoryDir};

/// Images of CRIU since 1.6 (version 1.1 of its format).
const COMMON_MAGIC: u32 = 0x5456_4319;

/// Fields of a record. In `mm-*.img` each mapping is one,
/// and the kernel allows 65 530 of them unless it is told otherwise
/// (vm.max_map_count). They are counted before they are decoded: one takes two
/// bytes at least, and some eighty here.
const MAX_FIELDS: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    Pstree = 0x5027_3030,
    Mm = 0x5749_2820,
    Core = 0x5505_3847,
    Pagemap = 0x5608_4025,
    Inventory = 0x5831_3116,
    Ids = 0x5443_2030,
    Files = 0x5630_3138,
    MemfdInode = 0x4845_3499,
    UserNs = 0x5547_4906,
}

impl Type {
    fn most_bytes(self) -> u64 {
        match self {
            // The pagemap of an ordinary dump of 64 GiB without any two pages
            // side by side has less.
            Type::Pagemap => 256 << 20,
            // [`MAX_FIELDS`] mappings as CRIU writes them, some 60 bytes each.
            Type::Mm => 64 << 20,
            // An open file each: a hundred bytes, or as many as its path has.
            Type::Files | Type::MemfdInode => 64 << 20,
            // As many processes or threads as the kernel has ids for, with
            // some ten bytes each.
            Type::Pstree => 64 << 20,
            // Registers, timers, signals: tens of KiB.
            Type::Core | Type::Inventory | Type::Ids | Type::UserNs => 1 << 20,
        }
    }

    /// The inventory says what version the others are of, so it has none.
    fn magic(self) -> Vec<u8> {
        let own = (self as u32).to_le_bytes();
        match self {
            Type::Inventory => own.to_vec(),
            _ => [COMMON_MAGIC.to_le_bytes(), own].concat(),
        }
    }
}

/// An image in memory.
pub struct Image {
    name: String,
    bytes: Vec<u8>,
    header: usize,
}

impl Image {
    /// `None`: there is no such file.
    pub fn read(dir: &MemoryDir, name: String, kind: Type) -> Result<Option<Self>, PagesError> {
        let file = match dir.open(&name) {
            Ok(file) => file,
            Err(CriuError::File { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let path = dir.path().join(&name);
        let mut bytes = Vec::new();
        let most = kind.most_bytes();
        file.take(most + 1).read_to_end(&mut bytes).map_err(CriuError::file("reading", &path))?;
        let magic = kind.magic();
        let image = Self { name, bytes, header: magic.len() };
        if image.bytes.len() as u64 > most {
            return Err(image.bad(dir, "it is too large"));
        }
        if !image.bytes.starts_with(&magic) {
            return Err(image.bad(dir, "it is of another type or version"));
        }
        Ok(Some(image))
    }

    pub fn bad(&self, dir: &MemoryDir, why: &'static str) -> PagesError {
        PagesError::Image { path: dir.path().join(&self.name), why }
    }

    /// The records' bytes, each inside the file and of a limited number of
    /// fields.
    pub fn records(&self) -> Records<'_> {
        Records(&self.bytes[self.header..])
    }

    /// The only record.
    pub fn only<M: Message + Default>(&self, dir: &MemoryDir) -> Result<M, PagesError> {
        let record = self.records().next();
        let record = record.transpose().map_err(|why| self.bad(dir, why))?;
        record
            .and_then(|bytes| M::decode(bytes).ok())
            .ok_or_else(|| self.bad(dir, "its record cannot be read"))
    }
}

/// One for each field, up to the first that is none: the decoder says so.
struct Fields<'a>(&'a [u8]);

impl Iterator for Fields<'_> {
    type Item = ();

    fn next(&mut self) -> Option<()> {
        if self.0.is_empty() {
            return None;
        }
        let (tag, wire_type) = decode_key(&mut self.0).ok()?;
        skip_field(wire_type, tag, &mut self.0, DecodeContext::default()).ok()
    }
}

pub struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Result<&'a [u8], &'static str>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let split = self
            .0
            .split_first_chunk::<4>()
            .and_then(|(length, rest)| rest.split_at_checked(u32::from_le_bytes(*length) as usize));
        let Some((record, rest)) = split else {
            self.0 = &[];
            return Some(Err("a record is cut short"));
        };
        self.0 = rest;
        // Most have too few bytes for that, and are not looked at.
        if record.len() > 2 * MAX_FIELDS && Fields(record).nth(MAX_FIELDS).is_some() {
            return Some(Err("a record has too many fields"));
        }
        Some(Ok(record))
    }
}

/// An image to be written.
pub struct Writer(Vec<u8>);

impl Writer {
    pub fn new(kind: Type) -> Self {
        Self(kind.magic())
    }

    pub fn record(&mut self, bytes: &[u8]) {
        self.0.extend((bytes.len() as u32).to_le_bytes());
        self.0.extend_from_slice(bytes);
    }

    pub fn replace(self, dir: &MemoryDir, name: &str) -> Result<(), PagesError> {
        let written = dir.replace(name, |file| file.write_all(&self.0));
        Ok(written?)
    }
}

/// `pstree_entry`
#[derive(Clone, PartialEq, Message)]
pub struct PstreeEntry {
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    pub threads: Vec<u32>,
}

/// `mm_entry`
#[derive(Clone, PartialEq, Message)]
pub struct MmEntry {
    #[prost(message, repeated, tag = "14")]
    pub vmas: Vec<VmaEntry>,
}

/// `vma_entry`
#[derive(Clone, PartialEq, Message)]
pub struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    #[prost(uint64, required, tag = "3")]
    pub pgoff: u64,
    #[prost(uint64, required, tag = "4")]
    pub shmid: u64,
    #[prost(uint32, required, tag = "5")]
    pub prot: u32,
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    #[prost(uint32, required, tag = "7")]
    pub status: u32,
    #[prost(sint64, required, tag = "8")]
    pub fd: i64,
    /// A bit for each piece of advice of madvise(2).
    #[prost(uint64, optional, tag = "9")]
    pub madv: Option<u64>,
    /// How the mapped file was opened.
    #[prost(uint32, optional, tag = "10")]
    pub fdflags: Option<u32>,
}

/// `file_entry`
#[derive(Clone, PartialEq, Message)]
pub struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    pub kind: u32,
    #[prost(uint32, required, tag = "2")]
    pub id: u32,
    #[prost(message, optional, tag = "20")]
    pub memfd: Option<MemfdFileEntry>,
}

/// `memfd_file_entry`
#[derive(Clone, PartialEq, Message)]
pub struct MemfdFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(uint64, required, tag = "3")]
    pub pos: u64,
    #[prost(message, required, tag = "4")]
    pub fown: FownEntry,
    #[prost(uint32, required, tag = "5")]
    pub inode_id: u32,
}

impl MemfdFileEntry {
    /// Somebody asked to hear of it.
    pub fn signals_somebody(&self) -> bool {
        self.fown.pid != 0 || self.fown.signum != 0
    }
}

/// `fown_entry`: who hears of it (`F_SETOWN`).
#[derive(Clone, PartialEq, Message)]
pub struct FownEntry {
    #[prost(uint32, required, tag = "1")]
    pub uid: u32,
    #[prost(uint32, required, tag = "2")]
    pub euid: u32,
    #[prost(uint32, required, tag = "3")]
    pub signum: u32,
    #[prost(uint32, required, tag = "4")]
    pub pid_type: u32,
    #[prost(uint32, required, tag = "5")]
    pub pid: u32,
}

/// `memfd_inode_entry`
#[derive(Clone, PartialEq, Message)]
pub struct MemfdInodeEntry {
    #[prost(bytes = "vec", required, tag = "1")]
    pub name: Vec<u8>,
    #[prost(uint32, required, tag = "2")]
    pub uid: u32,
    #[prost(uint32, required, tag = "3")]
    pub gid: u32,
    #[prost(uint64, required, tag = "4")]
    pub size: u64,
    #[prost(uint32, required, tag = "5")]
    pub shmid: u32,
    #[prost(uint32, required, tag = "6")]
    pub seals: u32,
    #[prost(uint64, required, tag = "7")]
    pub inode_id: u64,
    #[prost(uint32, optional, tag = "8")]
    pub hugetlb_flag: Option<u32>,
    #[prost(uint32, optional, tag = "9")]
    pub mode: Option<u32>,
}

/// `userns_entry`
#[derive(Clone, PartialEq, Message)]
pub struct UserNsEntry {
    #[prost(message, repeated, tag = "1")]
    pub users: Vec<IdExtent>,
    #[prost(message, repeated, tag = "2")]
    pub groups: Vec<IdExtent>,
}

/// `uid_gid_extent`
#[derive(Clone, PartialEq, Message)]
pub struct IdExtent {
    #[prost(uint32, required, tag = "1")]
    pub first: u32,
    #[prost(uint32, required, tag = "2")]
    pub lower_first: u32,
    #[prost(uint32, required, tag = "3")]
    pub count: u32,
}

impl UserNsEntry {
    /// A user or a group of the namespace, as the host knows it.
    pub fn outside(&self, id: u32, group: bool) -> Option<u32> {
        let extents = if group { &self.groups } else { &self.users };
        extents.iter().find_map(|extent| {
            let at = id.checked_sub(extent.first).filter(|at| *at < extent.count)?;
            extent.lower_first.checked_add(at)
        })
    }
}

/// `inventory_entry`
#[derive(Clone, PartialEq, Message)]
pub struct InventoryEntry {
    /// Those of the CRIU that wrote the images.
    #[prost(message, optional, tag = "3")]
    pub root_ids: Option<IdsEntry>,
}

/// `task_kobj_ids_entry`
#[derive(Clone, PartialEq, Message)]
pub struct IdsEntry {
    #[prost(uint32, optional, tag = "6")]
    pub net_ns_id: Option<u32>,
}

/// `core_entry`, as far as the stack pointer is.
#[derive(Clone, PartialEq, Message)]
pub struct CoreEntry {
    #[prost(message, optional, tag = "2")]
    pub x86: Option<ThreadInfoX86>,
    #[prost(message, optional, tag = "8")]
    pub aarch64: Option<ThreadInfoAarch64>,
}

impl CoreEntry {
    pub fn stack_pointer(&self) -> Option<u64> {
        let x86 = self.x86.as_ref().and_then(|info| info.registers.as_ref()).map(|r| r.sp);
        let arm = self.aarch64.as_ref().and_then(|info| info.registers.as_ref()).map(|r| r.sp);
        x86.or(arm)
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct ThreadInfoX86 {
    #[prost(message, optional, tag = "2")]
    pub registers: Option<RegistersX86>,
}

#[derive(Clone, PartialEq, Message)]
pub struct RegistersX86 {
    #[prost(uint64, tag = "20")]
    pub sp: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct ThreadInfoAarch64 {
    #[prost(message, optional, tag = "3")]
    pub registers: Option<RegistersAarch64>,
}

#[derive(Clone, PartialEq, Message)]
pub struct RegistersAarch64 {
    #[prost(uint64, tag = "2")]
    pub sp: u64,
}

/// `pagemap_head`
#[derive(Clone, PartialEq, Message)]
pub struct PagemapHead {
    #[prost(uint32, required, tag = "1")]
    pub pages_id: u32,
}

/// `pagemap_entry`
#[derive(Clone, PartialEq, Message)]
pub struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    pub vaddr: u64,
    /// Up to CRIU 4.1; later ones write 0.
    #[prost(uint32, required, tag = "2")]
    pub compat_nr_pages: u32,
    #[prost(bool, optional, tag = "3")]
    pub in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    pub flags: Option<u32>,
    /// Since CRIU 4.2.
    #[prost(uint64, optional, tag = "5")]
    pub nr_pages: Option<u64>,
}
