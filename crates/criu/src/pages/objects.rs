//! Shared objects that CRIU is given, instead of images to fill new ones from.
//!
//! CRIU makes each object anew and copies its contents into it while nobody
//! runs. But it also takes open files from whoever starts it (`inherit_fd`),
//! memfds among them, and maps and hands out those: so an object that was
//! filled while its container still ran elsewhere costs nothing in the pause.
//!
//! CRIU finds such a file by its name, and gives the same open file to
//! whatever has that name. An object may have been opened several times, each
//! time with flags and a position of its own, so in the images each of its
//! *open files* gets a name of its own here, and one more each for what is
//! mapped for reading, and for writing:
//!
//! ```text
//! memfd.img    contents ──┐      transship-0   transship-1   transship-2
//!                         │           ▲             ▲             ▲
//! files.img    5 O_RDWR ──┤      5 ───┘      9 ─────┘     10 ─────┘
//!              9 O_RDONLY ┤                               (new)
//! mm-1.img     7f00.. of 5┘                  7f00.. of 10
//! ```
//!
//! The names lead to our descriptors and are seen by nobody: what the
//! processes see is the name that the object itself was made with. Anonymous
//! shared memory is a memfd to CRIU as well. SysV segments are not.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{File, OpenOptions, Permissions},
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{OpenOptionsExt, PermissionsExt, fchown},
    },
};

use nix::{
    fcntl::{FcntlArg, OFlag, SealFlag, fcntl},
    libc,
};
use prost::Message;
use transship_types::Space;

use super::{
    PagesError,
    complete::Pagemap,
    image::{
        FileEntry, Image, MemfdFileEntry, MemfdInodeEntry, MmEntry, PstreeEntry, Type, UserNsEntry,
        VmaEntry, Writer,
    },
};
use crate::{Inherited, MAX_INHERITED, fields::Fields, images::MemoryDir};

/// `fd_types` of CRIU's fdinfo.proto.
const MEMFD: u32 = 18;

/// A shmid that no image is of. Should CRIU not find the file it was given, it
/// must fail, not make an empty object.
const NO_IMAGE: u32 = u32::MAX;

/// What open(2) takes of the flags that a file was opened with.
const OPEN_FLAGS: i32 =
    libc::O_APPEND | libc::O_NONBLOCK | libc::O_NOATIME | libc::O_SYNC | libc::O_DIRECT;

/// Field numbers of the messages that are edited.
mod field {
    pub const INODE_NAME: u32 = 1;
    pub const INODE_SHMID: u32 = 5;
    pub const INODE_ID: u32 = 7;
    pub const FILE_MEMFD: u32 = 20;
    pub const MEMFD_INODE_ID: u32 = 5;
    pub const MM_VMAS: u32 = 14;
    pub const VMA_SHMID: u32 = 4;
    pub const VMA_STATUS: u32 = 7;
}

/// What CRIU is given.
#[derive(Default)]
pub struct Given {
    /// For its request ([`Amendments::inherit`](crate::Amendments::inherit)).
    pub files: Vec<Inherited>,
    pub seals: Seals,
    /// Objects that it must restore itself, and why.
    pub left: Vec<(u64, String)>,
}

/// Seals that are put on once everything is mapped: before, some would forbid
/// just that.
#[derive(Default)]
pub struct Seals(Vec<(File, SealFlag)>);

impl Seals {
    pub fn apply(self) -> io::Result<()> {
        for (file, seals) in self.0 {
            fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        }
        Ok(())
    }
}

/// Makes these objects, by their inodes in the images, what the images say of
/// them, and has the images say that CRIU is given them. Each is a memfd with
/// all of its contents, not sealed.
pub fn give(dir: &MemoryDir, objects: &BTreeMap<u64, File>) -> Result<Given, PagesError> {
    let mut given = Given::default();
    if objects.is_empty() {
        return Ok(given);
    }
    let mut images = Images::read(dir)?;
    for (&inode, file) in objects {
        let pagemap = Pagemap::read(dir, Space::Shared(inode));
        let plan = match pagemap {
            Ok(pagemap) if pagemap.saved.is_empty() => images.plan(inode),
            Ok(_) => Err("CRIU has saved it".into()),
            Err(error) => Err(error.to_string()),
        };
        let room = MAX_INHERITED - given.files.len();
        let opened = plan.and_then(|plan| match plan.files.len() {
            more if more > room => Err("CRIU cannot be given that many files".into()),
            _ => plan.open(file, given.files.len()).map(|opened| (plan, opened)),
        });
        match opened {
            Ok((plan, opened)) => {
                images.name(&plan, &opened);
                if let Some(seals) = plan.seals() {
                    let file = file.try_clone().map_err(|source| lost(inode, source))?;
                    given.seals.0.push((file, seals));
                }
                given.files.extend(opened);
            }
            Err(why) => given.left.push((inode, why)),
        }
    }
    images.write(dir)?;
    Ok(given)
}

fn lost(inode: u64, source: io::Error) -> PagesError {
    PagesError::Give { inode, source }
}

/// What the images say of memfds.
struct Images {
    inodes: Vec<(Fields, MemfdInodeEntry)>,
    files: Vec<(Vec<u8>, FileEntry)>,
    maps: Vec<Map>,
    mapped: HashMap<u64, Mapped>,
    owners: Option<UserNsEntry>,
    next_file: u32,
    next_inode: u64,
    /// Of files: what their records become.
    renamed: HashMap<u32, u64>,
    /// Records that are new.
    new_files: Vec<FileEntry>,
    new_inodes: Vec<Fields>,
    /// By file and by being writable: what mappings of it are of now.
    moved: HashMap<(u32, bool), u32>,
}

/// The mappings of a process, some of them of memfds.
struct Map {
    vpid: u32,
    record: Vec<u8>,
}

/// How a file is mapped, by anybody.
#[derive(Debug, Clone, Copy, Default)]
struct Mapped {
    /// Opened for reading alone, and for writing too.
    read: bool,
    write: bool,
    /// Opened for writing, and shared.
    shared: bool,
}

/// What becomes of one object.
struct Plan {
    fields: Fields,
    entry: MemfdInodeEntry,
    uid: u32,
    gid: u32,
    files: Vec<Wanted>,
}

/// An open file that CRIU is to be given.
struct Wanted {
    flags: i32,
    position: u64,
    of: Of,
}

#[derive(Clone, Copy)]
enum Of {
    /// Of processes, or on its way between them.
    File(u32),
    /// Of mappings for which the object was opened so.
    Mappings { writable: bool },
}

impl Images {
    fn read(dir: &MemoryDir) -> Result<Self, PagesError> {
        let mut images = Self {
            inodes: Vec::new(),
            files: Vec::new(),
            maps: Vec::new(),
            mapped: HashMap::new(),
            owners: None,
            next_file: 1,
            next_inode: 1,
            renamed: HashMap::new(),
            new_files: Vec::new(),
            new_inodes: Vec::new(),
            moved: HashMap::new(),
        };
        each(dir, "memfd.img", Type::MemfdInode, |record| {
            let entry = MemfdInodeEntry::decode(record).ok()?;
            images.next_inode = images.next_inode.max(entry.inode_id.checked_add(1)?);
            images.inodes.push((Fields::parse(record).ok()?, entry));
            Some(())
        })?;
        each(dir, "files.img", Type::Files, |record| {
            let entry = FileEntry::decode(record).ok()?;
            images.next_file = images.next_file.max(entry.id.checked_add(1)?);
            images.files.push((record.to_vec(), entry));
            Some(())
        })?;
        let (mut processes, mut seen) = (Vec::new(), HashSet::new());
        each(dir, "pstree.img", Type::Pstree, |record| {
            let pid = PstreeEntry::decode(record).ok()?.pid;
            // Twice, and its mappings would be remembered twice.
            seen.insert(pid).then(|| processes.push(pid))
        })?;
        for vpid in processes {
            each(dir, &format!("mm-{vpid}.img"), Type::Mm, |record| {
                let mm = MmEntry::decode(record).ok()?;
                let mut any = false;
                for vma in mm.vmas.iter().filter(|vma| vma.is_memfd()) {
                    let mapped = images.mapped.entry(vma.shmid).or_default();
                    let writable = vma.is_of_writable_file();
                    mapped.read |= !writable;
                    mapped.write |= writable;
                    mapped.shared |= writable && vma.is_shared();
                    any = true;
                }
                if any {
                    images.maps.push(Map { vpid, record: record.to_vec() });
                }
                Some(())
            })?;
        }
        images.owners = owners(dir)?;
        Ok(images)
    }

    /// The error says why CRIU must make the object itself.
    fn plan(&self, inode: u64) -> Result<Plan, String> {
        let mut of_it = self.inodes.iter().filter(|(_, entry)| u64::from(entry.shmid) == inode);
        let (Some((fields, entry)), None) = (of_it.next(), of_it.next()) else {
            return Err("CRIU does not restore it as a memfd".into());
        };
        if entry.hugetlb_flag.is_some_and(|flag| flag != 0) {
            return Err("it has huge pages".into());
        }
        let mut files = Vec::new();
        let mut mapped = Mapped::default();
        for memfd in self.files.iter().filter_map(|(_, file)| file.memfd.as_ref()) {
            if u64::from(memfd.inode_id) != entry.inode_id {
                continue;
            }
            let flags = memfd.flags as i32;
            if flags & libc::O_PATH != 0 || memfd.signals_somebody() {
                return Err("it is open in an unusual way".into());
            }
            let (position, of) = (memfd.pos, Of::File(memfd.id));
            files.push(Wanted { flags, position, of });
            if let Some(own) = self.mapped.get(&u64::from(memfd.id)) {
                mapped.read |= own.read;
                mapped.write |= own.write;
                mapped.shared |= own.shared;
            }
        }
        if mapped.shared && entry.seals & libc::F_SEAL_WRITE as u32 != 0 {
            return Err("it is sealed against what maps it".into());
        }
        let of = |writable| Of::Mappings { writable };
        if mapped.read {
            files.push(Wanted { flags: libc::O_RDONLY, position: 0, of: of(false) });
        }
        if mapped.write {
            files.push(Wanted { flags: libc::O_RDWR, position: 0, of: of(true) });
        }
        let owner = |id: u32, group: bool| match &self.owners {
            None => Ok(id),
            Some(owners) => owners.outside(id, group).ok_or("its owner is nobody here"),
        };
        Ok(Plan {
            fields: fields.clone(),
            uid: owner(entry.uid, false)?,
            gid: owner(entry.gid, true)?,
            entry: entry.clone(),
            files,
        })
    }

    /// Gives each open file of the object the name under which CRIU gets it.
    fn name(&mut self, plan: &Plan, opened: &[Inherited]) {
        let mut moved = HashMap::new();
        let mut own = Vec::new();
        for (wanted, inherited) in plan.files.iter().zip(opened) {
            let inode = self.next_inode;
            self.next_inode += 1;
            let mut fields = plan.fields.clone();
            fields.set_bytes(field::INODE_NAME, name_in(&inherited.key).as_bytes());
            fields.set_varint(field::INODE_SHMID, NO_IMAGE.into());
            fields.set_varint(field::INODE_ID, inode);
            self.new_inodes.push(fields);
            match wanted.of {
                Of::File(id) => {
                    own.push(id);
                    self.renamed.insert(id, inode);
                }
                Of::Mappings { writable } => {
                    let id = self.next_file;
                    self.next_file += 1;
                    moved.insert(writable, id);
                    let memfd = MemfdFileEntry { id, inode_id: inode as u32, ..Default::default() };
                    self.new_files.push(FileEntry { kind: MEMFD, id, memfd: Some(memfd) });
                }
            }
        }
        for (writable, to) in moved {
            self.moved.extend(own.iter().map(|file| ((*file, writable), to)));
        }
    }

    fn write(self, dir: &MemoryDir) -> Result<(), PagesError> {
        if self.new_inodes.is_empty() {
            return Ok(());
        }
        let mut inodes = Writer::new(Type::MemfdInode);
        for fields in self.inodes.iter().map(|(fields, _)| fields).chain(&self.new_inodes) {
            inodes.record(&fields.encode());
        }
        let mut files = Writer::new(Type::Files);
        for (record, entry) in &self.files {
            match self.renamed.get(&entry.id) {
                None => files.record(record),
                Some(inode) => files.record(&of_inode(record, *inode)),
            }
        }
        for entry in &self.new_files {
            files.record(&entry.encode_to_vec());
        }
        for map in &self.maps {
            let name = format!("mm-{}.img", map.vpid);
            let mut writer = Writer::new(Type::Mm);
            writer.record(&self.moved_in(&map.record));
            writer.replace(dir, &name)?;
        }
        files.replace(dir, "files.img")?;
        inodes.replace(dir, "memfd.img")
    }

    /// The record of a process's mappings, each of what is mapped now.
    fn moved_in(&self, record: &[u8]) -> Vec<u8> {
        edited(record, field::MM_VMAS, |vma| {
            let status = vma.varint(field::VMA_STATUS).unwrap_or_default();
            if status & u64::from(VmaEntry::MEMFD) == 0 {
                return;
            }
            let decoded = VmaEntry::decode(vma.encode().as_slice()).unwrap_or_default();
            let file = u32::try_from(decoded.shmid).unwrap_or_default();
            if let Some(to) = self.moved.get(&(file, decoded.is_of_writable_file())) {
                vma.set_varint(field::VMA_SHMID, (*to).into());
            }
        })
    }
}

impl Plan {
    fn seals(&self) -> Option<SealFlag> {
        let mut seals = SealFlag::from_bits_retain(self.entry.seals as i32);
        if self.is_anonymous() {
            // As it was: nobody could make it shorter. Who saves it the next
            // time can rely on that.
            seals |= SealFlag::F_SEAL_SHRINK;
        }
        (!seals.is_empty()).then_some(seals)
    }

    /// Memory that has no name but the kernel's, and was never open: CRIU knows
    /// no flags for it.
    fn is_anonymous(&self) -> bool {
        let is_open = |wanted: &Wanted| matches!(wanted.of, Of::File(_)) && wanted.flags != 0;
        self.entry.name == b"/dev/zero" && !self.files.iter().any(is_open)
    }

    /// Makes of `file` what the images say, and opens it as often as it was
    /// open. The error says why that cannot be.
    fn open(&self, file: &File, number: usize) -> Result<Vec<Inherited>, String> {
        let open = || -> io::Result<Vec<Inherited>> {
            file.set_len(self.entry.size)?;
            fchown(file, Some(self.uid), Some(self.gid))?;
            if let Some(mode) = self.entry.mode {
                file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
            }
            let mut original = Some(file);
            let mut opened = Vec::new();
            for (index, wanted) in self.files.iter().enumerate() {
                let file = wanted.open(file, &mut original)?;
                opened.push(Inherited { key: key(number + index), file });
            }
            Ok(opened)
        };
        open().map_err(|error| error.to_string())
    }
}

impl Wanted {
    fn open(&self, file: &File, original: &mut Option<&File>) -> io::Result<OwnedFd> {
        let (access, flags) = (self.flags & libc::O_ACCMODE, self.flags & OPEN_FLAGS);
        // The first that writes gets the file as it was made: no other may be
        // executed, for which some make a memfd.
        let original = match (self.of, access) {
            (Of::File(_), libc::O_RDWR) => original.take(),
            _ => None,
        };
        let mut opened = match original {
            Some(original) => {
                fcntl(original, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags)))?;
                original.try_clone()?
            }
            None => OpenOptions::new()
                .read(access != libc::O_WRONLY)
                .write(access != libc::O_RDONLY)
                .custom_flags(flags)
                .open(format!("/proc/self/fd/{}", file.as_raw_fd()))?,
        };
        opened.seek(SeekFrom::Start(self.position))?;
        Ok(opened.into())
    }
}

/// How CRIU calls a memfd of that name.
fn key(number: usize) -> String {
    format!("/memfd:transship-{number}")
}

fn name_in(key: &str) -> &str {
    key.strip_prefix("/memfd:").unwrap_or(key)
}

/// The record of a file, with another inode.
fn of_inode(record: &[u8], inode: u64) -> Vec<u8> {
    edited(record, field::FILE_MEMFD, |memfd| memfd.set_varint(field::MEMFD_INODE_ID, inode))
}

/// The record with each occurrence of an embedded message edited. Everything
/// else stays as CRIU wrote it, also what we do not know.
fn edited(record: &[u8], number: u32, edit: impl FnMut(&mut Fields)) -> Vec<u8> {
    let mut fields = match Fields::parse(record) {
        Ok(fields) => fields,
        // It was decoded before; nothing is left to say about it.
        Err(_) => return record.to_vec(),
    };
    match fields.edit_all(number, edit) {
        Ok(()) => fields.encode(),
        Err(_) => record.to_vec(),
    }
}

/// Calls `take` with each record of an image, if there is such an image.
fn each(
    dir: &MemoryDir,
    name: &str,
    kind: Type,
    mut take: impl FnMut(&[u8]) -> Option<()>,
) -> Result<(), PagesError> {
    let Some(image) = Image::read(dir, name.into(), kind)? else { return Ok(()) };
    for record in image.records() {
        let record = record.map_err(|why| image.bad(dir, why))?;
        take(record).ok_or_else(|| image.bad(dir, "a record cannot be read"))?;
    }
    Ok(())
}

/// Of the container's user namespace, if it has one of its own.
fn owners(dir: &MemoryDir) -> Result<Option<UserNsEntry>, PagesError> {
    let mut all = UserNsEntry::default();
    let mut any = false;
    for (name, _) in dir.files()? {
        let Some(name) = name.to_str().filter(|name| name.starts_with("userns-")) else { continue };
        any = true;
        each(dir, name, Type::UserNs, |record| {
            all = UserNsEntry::decode(record).ok()?;
            Some(())
        })?;
    }
    Ok(any.then_some(all))
}

#[cfg(test)]
mod tests;
