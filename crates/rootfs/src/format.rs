//! The stream of one pass: records that walk the tree depth first.
//!
//! ```text
//! version  Root  ( Enter … Leave | File Data* FileEnd | Link | Symlink | Node | Remove )*  End
//! ```
//!
//! A record names an entry by one component, relative to the directory that
//! was entered last, and names ascend within a directory. So no record can
//! name anything outside the root, and none can come twice. The only path is
//! the first name of a hard link. docs/protocol.md gives the bytes.
//!
//! Decoding checks every value once; what it returns needs no second look. A
//! length is compared with its limit before anything is allocated for it.

use std::{
    ffi::OsStr,
    fmt,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use rustix::fs::FileType;

use crate::Problem;

pub(crate) const VERSION: u8 = 1;

/// NAME_MAX of every Linux file system that can carry an overlay.
const MAX_NAME: usize = 255;
/// PATH_MAX without its NUL: a longer path could not be opened in one call.
pub(crate) const MAX_PATH: usize = 4095;
/// XATTR_SIZE_MAX of the kernel.
const MAX_VALUE: usize = 64 << 10;
/// The attributes of one entry together. XFS alone would allow more; nothing
/// a container needs does.
pub(crate) const MAX_ATTRIBUTES: usize = 1 << 20;
/// Content of one Data record: one read and one write.
pub(crate) const MAX_DATA: usize = 256 << 10;

/// One component of a path: not empty, no `/`, no NUL, neither `.` nor `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Name(Vec<u8>);

impl Name {
    pub(crate) fn new(bytes: &[u8]) -> Result<Self, Problem> {
        let why = match bytes {
            b"" => "is empty",
            b"." | b".." => "names a directory by its place",
            _ if bytes.len() > MAX_NAME => "is longer than 255 bytes",
            _ if bytes.contains(&b'/') => "is a path",
            _ if bytes.contains(&0) => "contains a NUL",
            _ => return Ok(Self(bytes.into())),
        };
        Err(Problem::Name { name: printable(bytes), why })
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", printable(&self.0))
    }
}

/// For an error: a hostile name may be long, and need not be text.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(MAX_NAME)];
    String::from_utf8_lossy(shown).into_owned()
}

/// An extended attribute that belongs to the container: [`carried`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attribute {
    pub(crate) name: Vec<u8>,
    pub(crate) value: Vec<u8>,
}

/// Whether an extended attribute moves with the file. Overlayfs keeps its own
/// marks under `trusted.overlay.`; labels of security modules, signatures and
/// the like belong to the node.
pub(crate) fn carried(name: &[u8]) -> bool {
    const EXACTLY: [&[u8]; 3] =
        [b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"];
    let below = |prefix: &[u8]| name.starts_with(prefix) && name.len() > prefix.len();
    EXACTLY.contains(&name)
        || below(b"user.")
        || (below(b"trusted.") && !name.starts_with(b"trusted.overlay."))
}

/// What an entry looks like, apart from its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Type and permissions, as in `st_mode`.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970, possibly negative, and nanoseconds.
    pub(crate) modified: (i64, u32),
    pub(crate) attributes: Vec<Attribute>,
}

impl Meta {
    pub(crate) fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    /// The root directory; `replace` empties it first.
    Root {
        replace: bool,
        meta: Meta,
    },
    /// A directory and what follows in it; `replace` removes first whatever
    /// the target has under that name.
    Enter {
        name: Name,
        replace: bool,
        meta: Meta,
    },
    Leave,
    /// A regular file of `size` bytes; what no Data record fills is a hole.
    File {
        name: Name,
        meta: Meta,
        size: u64,
    },
    /// `length` bytes of content follow.
    Data {
        offset: u64,
        length: u32,
    },
    FileEnd,
    /// One more name for a file sent before.
    Link {
        name: Name,
        first: Vec<Name>,
    },
    Symlink {
        name: Name,
        meta: Meta,
        target: Vec<u8>,
    },
    /// A device, fifo or socket.
    Node {
        name: Name,
        meta: Meta,
        major: u32,
        minor: u32,
    },
    Remove {
        name: Name,
    },
    /// Nothing follows.
    End {
        entries: u64,
        bytes: u64,
    },
}

mod tag {
    pub(super) const ROOT: u8 = 1;
    pub(super) const ENTER: u8 = 2;
    pub(super) const LEAVE: u8 = 3;
    pub(super) const FILE: u8 = 4;
    pub(super) const DATA: u8 = 5;
    pub(super) const FILE_END: u8 = 6;
    pub(super) const LINK: u8 = 7;
    pub(super) const SYMLINK: u8 = 8;
    pub(super) const NODE: u8 = 9;
    pub(super) const REMOVE: u8 = 10;
    pub(super) const END: u8 = 11;
}

impl Record {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Root { replace, meta } => {
                out.extend([tag::ROOT, u8::from(*replace)]);
                put_meta(out, meta);
            }
            Self::Enter { name, replace, meta } => {
                out.push(tag::ENTER);
                put_text(out, &name.0);
                out.push(u8::from(*replace));
                put_meta(out, meta);
            }
            Self::Leave => out.push(tag::LEAVE),
            Self::File { name, meta, size } => {
                out.push(tag::FILE);
                put_text(out, &name.0);
                put_meta(out, meta);
                out.extend(size.to_le_bytes());
            }
            Self::Data { offset, length } => {
                out.push(tag::DATA);
                out.extend(offset.to_le_bytes());
                out.extend(length.to_le_bytes());
            }
            Self::FileEnd => out.push(tag::FILE_END),
            Self::Link { name, first } => {
                out.push(tag::LINK);
                put_text(out, &name.0);
                let parts: Vec<&[u8]> = first.iter().map(Name::as_bytes).collect();
                put_text(out, &parts.join(&b'/'));
            }
            Self::Symlink { name, meta, target } => {
                out.push(tag::SYMLINK);
                put_text(out, &name.0);
                put_meta(out, meta);
                put_text(out, target);
            }
            Self::Node { name, meta, major, minor } => {
                out.push(tag::NODE);
                put_text(out, &name.0);
                put_meta(out, meta);
                out.extend(major.to_le_bytes());
                out.extend(minor.to_le_bytes());
            }
            Self::Remove { name } => {
                out.push(tag::REMOVE);
                put_text(out, &name.0);
            }
            Self::End { entries, bytes } => {
                out.push(tag::END);
                out.extend(entries.to_le_bytes());
                out.extend(bytes.to_le_bytes());
            }
        }
    }

    /// The first record of `bytes` and its length; `None` if more bytes are
    /// needed to tell.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, Problem> {
        let mut input = Input { bytes, at: 0 };
        match input.record() {
            Ok(record) => Ok(Some((record, input.at))),
            Err(Short::More) => Ok(None),
            Err(Short::Bad(problem)) => Err(problem),
        }
    }
}

/// The length is within 16 bits by construction: names and paths are limited.
fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    debug_assert!(text.len() <= MAX_PATH);
    out.extend((text.len() as u16).to_le_bytes());
    out.extend(text);
}

fn put_meta(out: &mut Vec<u8>, meta: &Meta) {
    out.extend(meta.mode.to_le_bytes());
    out.extend(meta.uid.to_le_bytes());
    out.extend(meta.gid.to_le_bytes());
    out.extend(meta.modified.0.to_le_bytes());
    out.extend(meta.modified.1.to_le_bytes());
    out.extend((meta.attributes.len() as u16).to_le_bytes());
    for Attribute { name, value } in &meta.attributes {
        put_text(out, name);
        out.extend((value.len() as u32).to_le_bytes());
        out.extend(value);
    }
}

enum Short {
    More,
    Bad(Problem),
}

impl From<Problem> for Short {
    fn from(problem: Problem) -> Self {
        Self::Bad(problem)
    }
}

struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Input<'a> {
    fn record(&mut self) -> Result<Record, Short> {
        let record = match self.u8()? {
            tag::ROOT => {
                let replace = self.flag()?;
                let meta = self.meta(b"/", &[FileType::Directory])?;
                Record::Root { replace, meta }
            }
            tag::ENTER => {
                let name = self.name()?;
                let replace = self.flag()?;
                let meta = self.meta(&name.0, &[FileType::Directory])?;
                Record::Enter { name, replace, meta }
            }
            tag::LEAVE => Record::Leave,
            tag::FILE => {
                let name = self.name()?;
                let meta = self.meta(&name.0, &[FileType::RegularFile])?;
                let size = self.u64()?;
                // `off_t` is signed.
                limit("the size of a file", size, i64::MAX as u64)?;
                Record::File { name, meta, size }
            }
            tag::DATA => {
                let offset = self.u64()?;
                let length = self.u32()?;
                limit("the length of data", length.into(), MAX_DATA as u64)?;
                Record::Data { offset, length }
            }
            tag::FILE_END => Record::FileEnd,
            tag::LINK => {
                let name = self.name()?;
                let path = self.text("the length of a path", MAX_PATH)?;
                let first = path.split(|&b| b == b'/').map(Name::new).collect::<Result<_, _>>()?;
                Record::Link { name, first }
            }
            tag::SYMLINK => {
                let name = self.name()?;
                let meta = self.meta(&name.0, &[FileType::Symlink])?;
                let target = self.text("the length of a link's target", MAX_PATH)?.to_vec();
                if target.is_empty() || target.contains(&0) {
                    return Err(value("target", &name.0, "it is empty or contains a NUL").into());
                }
                Record::Symlink { name, meta, target }
            }
            tag::NODE => {
                let name = self.name()?;
                let kinds = [
                    FileType::CharacterDevice,
                    FileType::BlockDevice,
                    FileType::Fifo,
                    FileType::Socket,
                ];
                let meta = self.meta(&name.0, &kinds)?;
                let (major, minor) = (self.u32()?, self.u32()?);
                if meta.file_type() == FileType::CharacterDevice && (major, minor) == (0, 0) {
                    return Err(value("device", &name.0, "0:0 is a whiteout").into());
                }
                Record::Node { name, meta, major, minor }
            }
            tag::REMOVE => Record::Remove { name: self.name()? },
            tag::END => Record::End { entries: self.u64()?, bytes: self.u64()? },
            other => return Err(Problem::Record(other).into()),
        };
        Ok(record)
    }

    fn meta(&mut self, of: &[u8], kinds: &[FileType]) -> Result<Meta, Short> {
        let mode = self.u32()?;
        if mode > 0o177_777 || !kinds.contains(&FileType::from_raw_mode(mode)) {
            return Err(value("mode", of, "it is of another type than the record").into());
        }
        let (uid, gid) = (self.u32()?, self.u32()?);
        if uid == u32::MAX || gid == u32::MAX {
            // chown(2) takes -1 for "leave it".
            return Err(value("owner", of, "-1 is nobody").into());
        }
        let modified = (self.i64()?, self.u32()?);
        if modified.1 >= 1_000_000_000 {
            return Err(value("time", of, "a second has 10^9 nanoseconds").into());
        }
        let count = self.u16()?;
        let mut attributes = Vec::new();
        let mut total = 0;
        for _ in 0..count {
            let name = self.text("the length of an attribute's name", MAX_NAME)?.to_vec();
            if !carried(&name) || name.contains(&0) {
                let what = "attribute";
                let why = "it is none that moves with a file";
                let name = format!("{} of {}", printable(&name), printable(of));
                return Err(Problem::Value { what, name, why }.into());
            }
            let length = self.u32()?;
            limit("the length of an attribute", length.into(), MAX_VALUE as u64)?;
            total += name.len() + length as usize;
            limit("the size of all attributes", total as u64, MAX_ATTRIBUTES as u64)?;
            let value = self.take(length as usize)?.to_vec();
            attributes.push(Attribute { name, value });
        }
        Ok(Meta { mode, uid, gid, modified, attributes })
    }

    fn name(&mut self) -> Result<Name, Short> {
        Ok(Name::new(self.text("the length of a name", MAX_NAME)?)?)
    }

    fn text(&mut self, what: &'static str, most: usize) -> Result<&'a [u8], Short> {
        let length = self.u16()?;
        limit(what, length.into(), most as u64)?;
        self.take(length.into())
    }

    fn flag(&mut self) -> Result<bool, Short> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Problem::Limit { what: "a flag", value: other.into(), limit: 1 }.into()),
        }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Short> {
        let taken = self.bytes.get(self.at..self.at + length).ok_or(Short::More)?;
        self.at += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u8(&mut self) -> Result<u8, Short> {
        self.array().map(u8::from_le_bytes)
    }
    fn u16(&mut self) -> Result<u16, Short> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Result<u32, Short> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Result<u64, Short> {
        self.array().map(u64::from_le_bytes)
    }
    fn i64(&mut self) -> Result<i64, Short> {
        self.array().map(i64::from_le_bytes)
    }
}

fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), Problem> {
    if value <= limit { Ok(()) } else { Err(Problem::Limit { what, value, limit }) }
}

fn value(what: &'static str, of: &[u8], why: &'static str) -> Problem {
    Problem::Value { what, name: printable(of), why }
}

/// The path that names make.
pub(crate) fn path_of(names: &[Name]) -> PathBuf {
    names.iter().map(Name::as_path).collect()
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
