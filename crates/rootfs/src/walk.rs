//! First half of a pass: what is there, and what of it the target lacks.
//!
//! Names come from the upper directory and from the index, and each is looked
//! up through the merged mount: what is not found there is gone, whichever
//! kind of whiteout hides it. A redirected directory (renamed, while its
//! content stayed in the image under the old name) and the tree of a file
//! system without layers have no names of their own in an upper directory:
//! there the merged mount gives the names as well.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsStr,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self, AtFlags, Stat},
    io::Errno,
    time::{ClockId, clock_gettime},
};

use crate::{
    Kind, Layer, RootfsError,
    beneath::Root,
    entry,
    format::{MAX_PATH, Name},
    index::{Index, Known, Mark, Stamp},
    mounts,
};

/// Entries of a layer, and of one pass over it. Each costs about 300 bytes in
/// an index, and an inode where it arrives; a layer with more is a volume in
/// the wrong place.
pub(crate) const MAX_ENTRIES: u64 = 8 << 20;

#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) name: Vec<u8>,
    pub(crate) what: What,
    /// It, or something below it, has to be sent.
    pub(crate) send: bool,
}

#[derive(Debug)]
pub(crate) enum What {
    Gone,
    Directory(Directory),
    Other {
        stamp: Stamp,
        /// Other names may lead to it.
        linked: bool,
    },
}

#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) stamp: Stamp,
    /// Whatever the target has there goes first.
    pub(crate) replace: bool,
    pub(crate) children: Vec<Seen>,
}

/// All names of one file: sent together or not at all, so that they still
/// lead to one file on the target.
#[derive(Debug, Default)]
struct Group {
    changed: bool,
}

pub(crate) struct Walk<'a> {
    layer: &'a Layer,
    pub(crate) merged: Root,
    /// None for [`Kind::Whole`].
    pub(crate) upper: Option<Root>,
    frozen: bool,
    mapped_unseen: bool,
    groups: HashMap<(u64, u64), Group>,
    entries: u64,
}

/// What a name leads to in the merged mount.
struct Found {
    stamp: Stamp,
    linked: bool,
}

type LookedUp = (Vec<u8>, Option<Found>);

/// How a directory looks from the upper side.
struct Upper {
    names: Vec<Vec<u8>>,
    /// Hides the image's directory of that name.
    opaque: bool,
    /// The merged mount gives a directory no lasting inode number when the
    /// layers lie on different file systems.
    inode: u64,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(layer: &'a Layer, frozen: bool) -> Result<Self, RootfsError> {
        let merged = Root::open(&layer.merged).map_err(RootfsError::io("open", &layer.merged))?;
        let upper = match layer.kind {
            Kind::Whole => None,
            Kind::Overlay { .. } => {
                let root = Root::open(&layer.upper);
                Some(root.map_err(RootfsError::io("open", &layer.upper))?)
            }
        };
        let mapped_unseen =
            mounts::forgets_mapped_stores(&layer.upper).map_err(|source| RootfsError::Io {
                doing: "examine the file system of",
                path: layer.upper.clone(),
                source,
            })?;
        let groups = HashMap::new();
        Ok(Self { layer, merged, upper, frozen, mapped_unseen, groups, entries: 0 })
    }

    /// The layer as it is now, with marks on what differs from `before`.
    pub(crate) fn run(&mut self, before: Option<&Index>) -> Result<Directory, RootfsError> {
        // With `links_kept` a change shows under names that only the image
        // has; a look at all of it finds them.
        let all = matches!(self.layer.kind, Kind::Overlay { links_kept: true, .. });
        let known = before.map(|index| &index.root);
        let root = self.directory(&mut PathBuf::new(), known, all)?;
        let mut root = root.ok_or_else(|| RootfsError::Changed(self.layer.merged.clone()))?;
        for child in &mut root.children {
            self.settle(child);
        }
        Ok(root)
    }

    /// None if it is no longer there. `all`: the target has nothing of it, so
    /// the image's part of it is wanted as well.
    fn directory(
        &mut self,
        path: &mut PathBuf,
        known: Option<&Known>,
        all: bool,
    ) -> Result<Option<Directory>, RootfsError> {
        let now = clock_gettime(ClockId::Realtime);
        let merged = match self.merged.directory(path) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if !self.frozen => return Ok(None),
            Err(errno) => return Err(self.failed("open the directory", path, errno)),
        };
        let stat = fs::fstat(&merged).map_err(|e| self.failed("examine", path, e))?;
        let mut stamp = Stamp::new(&stat, now, false);
        let upper = self.upper_of(path)?;
        stamp.opaque = upper.as_ref().is_none_or(|upper| upper.opaque);
        if let Some(upper) = &upper {
            stamp.inode = upper.inode;
        }
        let was = known.and_then(Known::stamp);
        let same = was.is_some_and(|was| {
            was.is_directory() && was.inode == stamp.inode && was.opaque == stamp.opaque
        });
        // A directory that came in place of something else, or that hides the
        // image's: what the target has there goes, and with it what the index
        // knows of its content.
        let replace = !same && (was.is_some() || stamp.opaque);
        let known = known.filter(|_| same);
        let all = all || upper.is_none() || (replace && !stamp.opaque);

        // Both, because only the upper directory tells what is gone.
        let mut names: BTreeSet<Vec<u8>> = BTreeSet::new();
        if all {
            names.extend(entry::names(&merged).map_err(|e| self.failed("list", path, e))?);
        }
        names.extend(upper.into_iter().flat_map(|upper| upper.names));
        names.extend(known.into_iter().flat_map(|k| k.children.keys().cloned()));

        let looked_up = self.look_up_all(path, &merged, names)?;
        // Descriptors are not held on the way down: a tree may be deeper than
        // a process may have open files.
        drop(merged);
        let mut children = Vec::with_capacity(looked_up.len());
        for (name, found) in looked_up {
            let known = known.and_then(|k| k.children.get(&name));
            path.push(OsStr::from_bytes(&name));
            let child = self.child(path, name, found, known, all)?;
            path.pop();
            children.push(child);
        }
        Ok(Some(Directory { stamp, replace, children }))
    }

    fn look_up_all(
        &mut self,
        path: &Path,
        merged: &OwnedFd,
        names: BTreeSet<Vec<u8>>,
    ) -> Result<Vec<LookedUp>, RootfsError> {
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return Err(RootfsError::TooManyEntries { limit: MAX_ENTRIES });
            }
            let child = path.join(OsStr::from_bytes(&name));
            let length = child.as_os_str().len();
            if length > MAX_PATH {
                return Err(RootfsError::PathTooLong { path: child, length, limit: MAX_PATH });
            }
            let now = clock_gettime(ClockId::Realtime);
            let stat = match fs::statat(merged, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => Some(stat),
                Err(Errno::NOENT) => None,
                Err(errno) => return Err(self.failed("examine", &child, errno)),
            };
            let stamp = stat.map(|stat: Stat| Found {
                stamp: Stamp::new(&stat, now, self.mapped_unseen),
                linked: stat.st_nlink > 1,
            });
            found.push((name, stamp));
        }
        Ok(found)
    }

    fn child(
        &mut self,
        path: &mut PathBuf,
        name: Vec<u8>,
        found: Option<Found>,
        known: Option<&Known>,
        all: bool,
    ) -> Result<Seen, RootfsError> {
        let gone = |name| {
            let send = !known.is_some_and(|k| k.mark == Mark::Absent);
            Seen { name, what: What::Gone, send }
        };
        let Some(Found { stamp, linked }) = found else { return Ok(gone(name)) };
        if stamp.is_directory() {
            let Some(directory) = self.directory(path, known, all)? else {
                return Ok(gone(name));
            };
            let holds = known
                .and_then(Known::stamp)
                .is_some_and(|was| !directory.replace && was.holds(&directory.stamp));
            return Ok(Seen { name, what: What::Directory(directory), send: !holds });
        }
        let send = !known.and_then(Known::stamp).is_some_and(|was| was.holds(&stamp));
        if linked {
            self.groups.entry(stamp.object()).or_default().changed |= send;
        }
        Ok(Seen { name, what: What::Other { stamp, linked }, send })
    }

    /// Spreads the marks: to all names of a file, and up to the directories
    /// that have to be entered.
    fn settle(&self, seen: &mut Seen) {
        match &mut seen.what {
            What::Gone => {}
            What::Other { stamp, linked } => {
                if *linked {
                    seen.send |= self.groups.get(&stamp.object()).is_some_and(|g| g.changed);
                }
            }
            What::Directory(directory) => {
                for child in &mut directory.children {
                    self.settle(child);
                    seen.send |= child.send;
                }
            }
        }
    }

    /// None if the layer's own names there do not tell what is in it: the
    /// directory is redirected, only the image has it, or there are no layers.
    fn upper_of(&self, path: &Path) -> Result<Option<Upper>, RootfsError> {
        let Some(root) = &self.upper else { return Ok(None) };
        let failed = |errno| self.failed("list the layer's side of", path, errno);
        let directory = match root.directory(path) {
            Ok(directory) => directory,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(errno) => return Err(failed(errno)),
        };
        if self.mark(&directory, "redirect").map_err(failed)?.is_some() {
            return Ok(None);
        }
        // "x" says that whiteouts inside may be attributes, not that the
        // directory hides anything; and above the root there is nothing.
        let opaque = self.mark(&directory, "opaque").map_err(failed)?.is_some_and(|v| v == b"y")
            && !path.as_os_str().is_empty();
        let inode = fs::fstat(&directory).map_err(failed)?.st_ino;
        Ok(Some(Upper { names: entry::names(&directory).map_err(failed)?, opaque, inode }))
    }

    /// One of overlayfs' own attributes.
    fn mark(&self, directory: &OwnedFd, name: &str) -> rustix::io::Result<Option<Vec<u8>>> {
        let prefix = match self.layer.kind {
            Kind::Overlay { user_attributes: true, .. } => "user.overlay.",
            _ => "trusted.overlay.",
        };
        let name = format!("{prefix}{name}");
        let value = entry::grow(
            |buffer| fs::fgetxattr(directory, name.as_str(), buffer),
            || fs::fgetxattr_query(directory, name.as_str()),
        );
        match value {
            Ok(value) => Ok(Some(value)),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn merged_path(&self, path: &Path) -> PathBuf {
        self.layer.merged.join(path)
    }

    pub(crate) fn failed(&self, doing: &'static str, path: &Path, errno: Errno) -> RootfsError {
        let path = self.merged_path(path);
        match errno {
            Errno::NOENT | Errno::STALE if self.frozen => RootfsError::Changed(path),
            errno => RootfsError::io(doing, path)(errno),
        }
    }

    /// A name that came from a directory listing is always one.
    pub(crate) fn name(&self, name: &[u8], within: &Path) -> Result<Name, RootfsError> {
        Name::new(name).map_err(|problem| RootfsError::Malformed { at: within.into(), problem })
    }
}
