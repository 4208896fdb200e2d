//! One entry of a file system, held by a descriptor: reading and writing what
//! it looks like without looking its name up again.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::{
    fs::{
        self, AtFlags, CWD, Gid, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid,
        XattrFlags,
    },
    io::{Errno, Result},
};

use crate::format::{Attribute, Meta, carried};

/// A descriptor of an entry of any type. Opened without being read (O_PATH),
/// so a fifo does not block and a device is not touched.
#[derive(Debug)]
pub(crate) struct Handle(OwnedFd);

impl Handle {
    /// The entry itself, even if it is a symbolic link.
    pub(crate) fn open(directory: &OwnedFd, name: &[u8]) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        fs::openat(directory, name, flags, Mode::empty()).map(Self)
    }

    pub(crate) fn stat(&self) -> Result<Stat> {
        fs::fstat(&self.0)
    }

    /// Names exactly this entry in calls that take no O_PATH descriptor: the
    /// last component is a magic link, which leads to the entry and not on.
    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }

    /// What the entry looks like now, with the attributes that move.
    pub(crate) fn meta(&self, stat: &Stat) -> Result<Meta> {
        let mut attributes = Vec::new();
        for name in self.attribute_names()? {
            match self.attribute(&name) {
                Ok(value) => attributes.push(Attribute { name, value }),
                // Removed since it was listed.
                Err(Errno::NODATA) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(Meta {
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            modified: (stat.st_mtime, stat.st_mtime_nsec as u32),
            attributes,
        })
    }

    /// Makes the entry look like `meta`, but for its time of modification:
    /// attributes it has and `meta` has not (an inherited default ACL) go.
    ///
    /// The order matters: chown(2) clears set-user-id bits and capabilities.
    pub(crate) fn apply(&self, meta: &Meta) -> Result<()> {
        let owner = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
        fs::chownat(&self.0, "", Some(owner.0), Some(owner.1), AtFlags::EMPTY_PATH)?;
        let link = meta.file_type() == fs::FileType::Symlink;
        if !link {
            let mode = Mode::from_raw_mode(meta.mode & 0o7777);
            fs::chmodat(CWD, self.path(), mode, AtFlags::empty())?;
        }
        let present = self.attribute_names()?;
        for name in &present {
            if !meta.attributes.iter().any(|wanted| wanted.name == *name) {
                match fs::removexattr(self.path(), name.as_slice()) {
                    Err(errno) if errno != Errno::NODATA => return Err(errno),
                    _ => {}
                }
            }
        }
        for Attribute { name, value } in &meta.attributes {
            fs::setxattr(self.path(), name.as_slice(), value, XattrFlags::empty())?;
        }
        Ok(())
    }

    pub(crate) fn set_modified(&self, (seconds, nanoseconds): (i64, u32)) -> Result<()> {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() },
        };
        fs::utimensat(CWD, self.path(), &times, AtFlags::empty())
    }

    fn attribute_names(&self) -> Result<Vec<Vec<u8>>> {
        let path = self.path();
        let list = grow(|buffer| fs::listxattr(&path, buffer), || fs::listxattr_query(&path));
        match list {
            Ok(list) => Ok(list
                .split(|&byte| byte == 0)
                .filter(|name| carried(name))
                .map(<[u8]>::to_vec)
                .collect()),
            // A file system without extended attributes.
            Err(Errno::OPNOTSUPP) => Ok(Vec::new()),
            Err(errno) => Err(errno),
        }
    }

    fn attribute(&self, name: &[u8]) -> Result<Vec<u8>> {
        let path = self.path();
        grow(|buffer| fs::getxattr(&path, name, buffer), || fs::getxattr_query(&path, name))
    }
}

/// Reads a value whose size is only known by asking, and may change between
/// the question and the reading. The kernel bounds it (64 KiB).
pub(crate) fn grow(
    read: impl Fn(&mut [u8]) -> Result<usize>,
    size: impl Fn() -> Result<usize>,
) -> Result<Vec<u8>> {
    loop {
        let mut buffer = vec![0; size()?];
        if buffer.is_empty() {
            return Ok(buffer);
        }
        match read(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(Errno::RANGE) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// The names in a directory, without `.` and `..`.
pub(crate) fn names(directory: &OwnedFd) -> Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}
