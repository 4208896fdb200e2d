//! Finding the writable layer of a mounted root file system.

use std::{
    collections::HashSet,
    ffi::OsString,
    fs, io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use crate::RootfsError;

/// How a layer is told from the image below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An overlay: the upper directory is the layer. `user_attributes` says
    /// that overlayfs keeps its marks in `user.overlay.*` (mount option
    /// `userxattr`); under the other prefix they are the container's own.
    /// `links_kept` says that a change to a file of the image shows under all
    /// its hard-linked names (`index=on`), also under those that the upper
    /// directory lacks, so the image is looked through as well; containerd
    /// and Docker mount with `index=off`.
    Overlay { user_attributes: bool, links_kept: bool },
    /// No overlay (the native snapshotter, btrfs, devmapper): the layer cannot
    /// be told from the image, so the whole tree is sent and replaces the
    /// target's.
    Whole,
}

/// A container's writable layer, as this node mounts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Where the container's changes lie; for [`Kind::Whole`] the tree itself.
    pub upper: PathBuf,
    /// The root file system as the container sees it.
    pub merged: PathBuf,
    pub kind: Kind,
}

impl Layer {
    /// The layer of the overlay mounted at `merged`, by whichever snapshotter
    /// or storage driver; `None` if what is mounted there is no overlay. The
    /// caller then refuses, or sends [`Layer::whole`].
    pub fn of_mount(merged: &Path) -> Result<Option<Self>, RootfsError> {
        let at = |doing| {
            let path = merged.to_path_buf();
            move |source| RootfsError::Io { doing, path, source }
        };
        let merged = fs::canonicalize(merged).map_err(at("find"))?;
        let table = fs::read("/proc/self/mountinfo").map_err(at("read the mount table for"))?;
        let Some(mount) = Mount::last_on(&table, &merged) else { return Ok(None) };
        if mount.kind != b"overlay" {
            return Ok(None);
        }
        let Some(upper) = mount.option(b"upperdir=") else {
            return Err(RootfsError::NoUpper(merged));
        };
        let user_attributes = mount.has(b"userxattr");
        // The mount table shows what differs from the module's default.
        let by_default = || fs::read("/sys/module/overlay/parameters/index");
        let links_kept = mount.has(b"index=on")
            || !mount.has(b"index=off") && by_default().is_ok_and(|v| v.starts_with(b"Y"));
        let upper = resolve_upper(Path::new(&upper), &merged)?;
        // Only part of an overlay may be mounted here (a bind mount).
        let within = mount.root.strip_prefix("/").unwrap_or(&mount.root);
        let upper = if within.as_os_str().is_empty() { upper } else { upper.join(within) };
        Ok(Some(Self { upper, merged, kind: Kind::Overlay { user_attributes, links_kept } }))
    }

    /// The whole tree at `merged`, for file systems without a layer of their
    /// own.
    pub fn whole(merged: &Path) -> Self {
        Self { upper: merged.into(), merged: merged.into(), kind: Kind::Whole }
    }

    /// Bytes the layer occupies on disk: what the target must have room for.
    /// An estimate, because the container goes on writing; what cannot be read
    /// does not count.
    pub fn bytes(&self) -> u64 {
        /// The unit of `st_blocks`, whatever the file system (stat(2)).
        const BLOCK: u64 = 512;
        let mut linked = HashSet::new();
        let mut bytes = 0u64;
        let mut directories = vec![self.upper.clone()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let Ok(status) = entry.metadata() else { continue };
                if status.is_dir() {
                    directories.push(entry.path());
                }
                if status.is_dir()
                    || status.nlink() == 1
                    || linked.insert((status.dev(), status.ino()))
                {
                    bytes = bytes.saturating_add(status.blocks().saturating_mul(BLOCK));
                }
            }
        }
        bytes
    }
}

/// Docker shortens long mount options by mounting from inside its storage
/// directory, which leaves a relative `upperdir=`. That directory is one of
/// those above the mount point.
fn resolve_upper(upper: &Path, merged: &Path) -> Result<PathBuf, RootfsError> {
    let candidates: Vec<PathBuf> = if upper.is_absolute() {
        vec![upper.into()]
    } else {
        merged.ancestors().skip(1).map(|above| above.join(upper)).collect()
    };
    candidates
        .into_iter()
        .find(|path| path.is_dir())
        .ok_or_else(|| RootfsError::LostUpper { upper: upper.into(), merged: merged.into() })
}

/// One line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount<'a> {
    pub(crate) id: u64,
    /// Of the file system, as `major:minor`.
    pub(crate) device: &'a [u8],
    /// The part of the file system that is mounted.
    pub(crate) root: PathBuf,
    pub(crate) point: PathBuf,
    /// Of this mount alone.
    pub(crate) flags: &'a [u8],
    /// It gives mounts to others, gets them from others, or refuses to be
    /// bound.
    pub(crate) propagates: bool,
    pub(crate) kind: &'a [u8],
    pub(crate) source: OsString,
    /// Of the file system. Still escaped, so that a comma is a separator.
    pub(crate) options: &'a [u8],
}

impl<'a> Mount<'a> {
    /// The last mount on a point covers the earlier ones.
    fn last_on(table: &'a [u8], point: &Path) -> Option<Self> {
        Self::all(table).rfind(|m| m.point == point)
    }

    /// Every line that is one.
    pub(crate) fn all(table: &'a [u8]) -> impl DoubleEndedIterator<Item = Self> {
        table.split(|&b| b == b'\n').filter_map(Self::parse)
    }

    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.split(|&b| b == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let _parent = fields.next()?;
        let device = fields.next()?;
        let root = unescape(fields.next()?).into();
        let point = unescape(fields.next()?).into();
        let flags = fields.next()?;
        // A varying number of optional fields up to "-".
        let propagates = fields.next()? != b"-";
        if propagates {
            fields.find(|&field| field == b"-")?;
        }
        let kind = fields.next()?;
        let source = unescape(fields.next()?);
        let options = fields.next()?;
        Some(Self { id, device, root, point, flags, propagates, kind, source, options })
    }

    fn has(&self, option: &[u8]) -> bool {
        self.options.split(|&b| b == b',').any(|o| o == option)
    }

    fn option(&self, name: &[u8]) -> Option<OsString> {
        self.options.split(|&b| b == b',').find_map(|o| o.strip_prefix(name)).map(unescape)
    }
}

/// The kernel writes blanks, backslashes and commas as `\ooo`.
fn unescape(text: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| byte == b'\\').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        if let Some(byte) = octal {
            plain.push(byte);
            rest = &after[3..];
        } else {
            plain.push(byte);
            rest = after;
        }
    }
    OsString::from_vec(plain)
}

/// Whether files keep no trace of stores through a shared mapping: memory
/// file systems never write a page out, so nothing makes it fault again.
pub(crate) fn forgets_mapped_stores(path: &Path) -> io::Result<bool> {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    let kind = rustix::fs::statfs(path.as_os_str().as_bytes())?.f_type as u64 & 0xffff_ffff;
    Ok(kind == TMPFS || kind == RAMFS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
30 22 0:40 / /run/a\\040b/rootfs rw shared:5 master:1 - overlay overlay rw,lowerdir=/l1:/l2,upperdir=/var/with\\054comma\\134and\\040blank/fs,workdir=/w\n\
31 22 0:41 / /run/ro rw - overlay overlay ro,lowerdir=/l1:/l2\n\
32 22 0:42 / /run/twice rw - overlay overlay rw,lowerdir=/l,upperdir=/below,workdir=/w,userxattr\n\
33 32 0:43 / /run/twice rw - tmpfs tmpfs rw\n\
34 22 0:44 /sub /run/part rw - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w\n\
a line of another kind\n";

    #[test]
    fn upper_directories_are_found_and_unescaped() {
        let mount = Mount::last_on(TABLE, Path::new("/run/a b/rootfs")).unwrap();
        assert_eq!(mount.kind, b"overlay");
        assert_eq!(mount.option(b"upperdir=").unwrap(), "/var/with,comma\\and blank/fs");
        assert_eq!(mount.option(b"nothing="), None);
        assert_eq!(Mount::last_on(TABLE, Path::new("/run/ro")).unwrap().option(b"upperdir="), None);
        assert_eq!(Mount::last_on(TABLE, Path::new("/run/part")).unwrap().root, Path::new("/sub"));
        assert_eq!(Mount::last_on(TABLE, Path::new("/run/none")), None);
    }

    #[test]
    fn the_mount_on_top_decides() {
        assert_eq!(Mount::last_on(TABLE, Path::new("/run/twice")).unwrap().kind, b"tmpfs");
    }

    #[test]
    fn escapes_cut_short_stay_as_they_are() {
        assert_eq!(unescape(b"a\\04"), "a\\04");
        assert_eq!(unescape(b"a\\zzz"), "a\\zzz");
        assert_eq!(unescape(b"\\040"), " ");
    }

    #[test]
    fn a_relative_upper_lies_above_the_mount_point() {
        let docker = tempfile::tempdir().unwrap();
        let merged = docker.path().join("overlay2/abc/merged");
        let upper = docker.path().join("overlay2/abc/diff");
        fs::create_dir_all(&merged).unwrap();
        fs::create_dir_all(&upper).unwrap();
        assert_eq!(resolve_upper(Path::new("abc/diff"), &merged).unwrap(), upper);
        assert!(matches!(
            resolve_upper(Path::new("abd/diff"), &merged),
            Err(RootfsError::LostUpper { .. })
        ));
    }

    #[test]
    fn what_is_not_mounted_is_no_overlay() {
        let plain = tempfile::tempdir().unwrap();
        assert_eq!(Layer::of_mount(plain.path()).unwrap(), None);
        assert!(Layer::of_mount(&plain.path().join("missing")).is_err());
    }
}
