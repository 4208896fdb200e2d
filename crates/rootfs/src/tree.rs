//! The root file system as a stream is applied to it, through the merged
//! mount of the target.
//!
//! Every change is made relative to the descriptor of a directory that was
//! opened beneath the root, under a name of one component, without following
//! links. A regular file that replaces another is written under a name of its
//! own and renamed, so a pass that breaks off leaves no torn file behind.
//!
//! What may be created is what the peer sends, devices and set-user-id bits
//! included: the peer has proved to be a node of ours, and the container could
//! make the same. Whether it may *use* a device is decided on this node as it
//! was on the other, by the device rules of the container's own spec.

use std::{
    ffi::OsStr,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self, AtFlags, FileType, Mode, OFlags},
    io::Errno,
};

use crate::{
    Problem, RootfsError,
    beneath::Root,
    entry::{self, Handle},
    format::{MAX_PATH, Meta, Name, path_of, printable},
};

/// Names to try for a file that replaces another. One suffices unless the
/// container has files of just these names.
const TEMPORARY_NAMES: u32 = 1000;

/// The root as far as it has been applied.
#[derive(Debug)]
pub(crate) struct Tree {
    root: Root,
    /// For errors.
    base: PathBuf,
    /// Directories that were entered and not left; the root first.
    levels: Vec<Level>,
    /// The innermost of them: its path beneath the root, and itself while it
    /// is needed. Only one is open at a time; a tree may be deeper than a
    /// process may have open files.
    path: PathBuf,
    directory: Option<OwnedFd>,
    file: Option<Incoming>,
}

#[derive(Debug)]
struct Level {
    modified: (i64, u32),
    /// The last name handled in it: names ascend.
    last: Option<Name>,
}

/// A regular file whose content is arriving.
#[derive(Debug)]
struct Incoming {
    name: Name,
    meta: Meta,
    size: u64,
    fd: OwnedFd,
    /// Where it lies until it is complete, if something has its name.
    temporary: Option<Vec<u8>>,
    /// Content arrives in ascending order.
    at: u64,
}

impl Tree {
    pub(crate) fn open(base: &Path) -> Result<Self, RootfsError> {
        let root = Root::open(base).map_err(RootfsError::io("open", base))?;
        Ok(Self {
            root,
            base: base.into(),
            levels: Vec::new(),
            path: PathBuf::new(),
            directory: None,
            file: None,
        })
    }

    pub(crate) fn root(&mut self, replace: bool, meta: &Meta) -> Result<(), RootfsError> {
        if replace {
            for name in entry::names(self.directory()?).map_err(|e| self.failed("list", e))? {
                let name = Name::new(&name).map_err(|problem| self.malformed(problem))?;
                self.remove(&name)?;
            }
        }
        self.look_like(meta)?;
        self.levels.push(Level { modified: meta.modified, last: None });
        Ok(())
    }

    pub(crate) fn enter(
        &mut self,
        name: Name,
        replace: bool,
        meta: &Meta,
    ) -> Result<(), RootfsError> {
        self.next_name(&name)?;
        let is_directory = self.type_of(&name)? == Some(FileType::Directory);
        if replace || !is_directory {
            self.remove(&name)?;
            let made = fs::mkdirat(self.directory()?, name.as_bytes(), Mode::RWXU);
            made.map_err(|e| self.failed_at("create", &name, e))?;
        }
        self.path.push(name.as_path());
        self.directory = None;
        self.look_like(meta)?;
        self.levels.push(Level { modified: meta.modified, last: None });
        Ok(())
    }

    /// Nothing in the directory changes any more, so its time can be set.
    pub(crate) fn leave(&mut self) -> Result<(), RootfsError> {
        self.no_file()?;
        if self.levels.len() < 2 {
            return Err(self.malformed(Problem::Place("it leaves the root")));
        }
        self.set_time()?;
        self.path.pop();
        self.directory = None;
        Ok(())
    }

    pub(crate) fn end(&mut self) -> Result<(), RootfsError> {
        self.no_file()?;
        if self.levels.len() != 1 {
            return Err(self.malformed(Problem::Place("it ends inside a directory")));
        }
        self.set_time()
    }

    fn set_time(&mut self) -> Result<(), RootfsError> {
        let Some(level) = self.levels.pop() else { return Ok(()) };
        let handle = self.here()?;
        handle.set_modified(level.modified).map_err(|e| self.failed("set the time of", e))
    }

    pub(crate) fn file(&mut self, name: Name, meta: Meta, size: u64) -> Result<(), RootfsError> {
        self.next_name(&name)?;
        let present = self.type_of(&name)?;
        if present == Some(FileType::Directory) {
            self.remove(&name)?;
        }
        let temporary = present.is_some_and(|kind| kind != FileType::Directory);
        let (fd, temporary) = if temporary {
            let (fd, temporary) = self.create_temporary(&name)?;
            (fd, Some(temporary))
        } else {
            let created = create(self.directory()?, name.as_bytes());
            (created.map_err(|e| self.failed_at("create", &name, e))?, None)
        };
        let file = self.file.insert(Incoming { name, meta, size, fd, temporary, at: 0 });
        let sized = fs::ftruncate(&file.fd, size);
        sized.map_err(|e| self.failed_in_file("make room for", e))
    }

    fn create_temporary(&mut self, name: &Name) -> Result<(OwnedFd, Vec<u8>), RootfsError> {
        for attempt in 0..TEMPORARY_NAMES {
            let temporary = format!(".transship-{attempt}").into_bytes();
            match create(self.directory()?, &temporary) {
                Ok(fd) => return Ok((fd, temporary)),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(self.failed_at("create", name, errno)),
            }
        }
        Err(self.failed_at("find a temporary name for", name, Errno::EXIST))
    }

    pub(crate) fn place_data(&mut self, offset: u64, length: u32) -> Result<(), RootfsError> {
        let Some(file) = &mut self.file else {
            return Err(self.malformed(Problem::Place("data without a file")));
        };
        let inside = offset.checked_add(length.into()).is_some_and(|end| end <= file.size);
        if offset < file.at || !inside {
            let problem = Problem::Place("data outside of its file, or out of order");
            return Err(self.malformed(problem));
        }
        file.at = offset;
        Ok(())
    }

    pub(crate) fn write(&mut self, mut data: &[u8]) -> Result<(), RootfsError> {
        while !data.is_empty() {
            let Some(file) = &mut self.file else {
                return Err(self.malformed(Problem::Place("data without a file")));
            };
            match rustix::io::pwrite(&file.fd, data, file.at) {
                Ok(0) => return Err(self.failed_in_file("write to", Errno::NOSPC)),
                Ok(written) => {
                    file.at += written as u64;
                    data = &data[written..];
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed_in_file("write to", errno)),
            }
        }
        Ok(())
    }

    pub(crate) fn file_end(&mut self) -> Result<(), RootfsError> {
        let Some(file) = self.file.take() else {
            return Err(self.malformed(Problem::Place("the end of no file")));
        };
        let result = self.complete(&file);
        if result.is_err() {
            // Dropping the tree clears it away.
            self.file = Some(file);
        }
        result
    }

    fn complete(&mut self, file: &Incoming) -> Result<(), RootfsError> {
        let lies_at = file.temporary.as_deref().unwrap_or(file.name.as_bytes());
        let handle = Handle::open(self.directory()?, lies_at);
        let handle = handle.map_err(|e| self.failed_at("open", &file.name, e))?;
        handle
            .apply(&file.meta)
            .and_then(|()| handle.set_modified(file.meta.modified))
            .map_err(|e| self.failed_at("set the attributes of", &file.name, e))?;
        if let Some(temporary) = &file.temporary {
            let directory = self.directory()?;
            fs::renameat(directory, temporary.as_slice(), directory, file.name.as_bytes())
                .map_err(|e| self.failed_at("replace", &file.name, e))?;
        }
        Ok(())
    }

    pub(crate) fn link(&mut self, name: Name, first: &[Name]) -> Result<(), RootfsError> {
        self.next_name(&name)?;
        let Some((last, parents)) = first.split_last() else {
            return Err(self.malformed(Problem::Place("a link to the root")));
        };
        let parent = self.root.directory(&path_of(parents));
        let parent = parent.map_err(|e| self.failed_at("find the other name of", &name, e))?;
        let present = fs::statat(&parent, last.as_bytes(), AtFlags::SYMLINK_NOFOLLOW);
        let present = present.map_err(|e| self.failed_at("find the other name of", &name, e))?;
        let here = self.path.join(name.as_path());
        if here == path_of(first) || FileType::from_raw_mode(present.st_mode) == FileType::Directory
        {
            return Err(self.malformed(Problem::Place("a link to itself or to a directory")));
        }
        // Not by rename: between two names of one file it does nothing.
        self.remove(&name)?;
        let directory = self.directory()?;
        fs::linkat(&parent, last.as_bytes(), directory, name.as_bytes(), AtFlags::empty())
            .map_err(|e| self.failed_at("link", &name, e))
    }

    pub(crate) fn symlink(
        &mut self,
        name: Name,
        meta: &Meta,
        target: &[u8],
    ) -> Result<(), RootfsError> {
        self.next_name(&name)?;
        self.remove(&name)?;
        fs::symlinkat(target, self.directory()?, name.as_bytes())
            .map_err(|e| self.failed_at("create", &name, e))?;
        self.made(&name, meta)
    }

    pub(crate) fn node(
        &mut self,
        name: Name,
        meta: &Meta,
        major: u32,
        minor: u32,
    ) -> Result<(), RootfsError> {
        self.next_name(&name)?;
        self.remove(&name)?;
        let device = fs::makedev(major, minor);
        let mode = Mode::RUSR | Mode::WUSR;
        fs::mknodat(self.directory()?, name.as_bytes(), meta.file_type(), mode, device)
            .map_err(|e| self.failed_at("create", &name, e))?;
        self.made(&name, meta)
    }

    fn made(&mut self, name: &Name, meta: &Meta) -> Result<(), RootfsError> {
        let handle = Handle::open(self.directory()?, name.as_bytes());
        handle
            .and_then(|handle| {
                handle.apply(meta)?;
                handle.set_modified(meta.modified)
            })
            .map_err(|e| self.failed_at("set the attributes of", name, e))
    }

    pub(crate) fn remove_named(&mut self, name: Name) -> Result<(), RootfsError> {
        self.next_name(&name)?;
        self.remove(&name)
    }

    /// Removes whatever has that name in the current directory, if anything.
    fn remove(&mut self, name: &Name) -> Result<(), RootfsError> {
        let start = self.path.join(name.as_path());
        match unlink(self.directory()?, name.as_bytes()) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(errno) => return Err(self.failed_at("remove", name, errno)),
        }
        // Depth first, one directory open at a time.
        let mut left = vec![(start, false)];
        while let Some((path, emptied)) = left.pop() {
            let failed = RootfsError::io("remove", self.base.join(&path));
            let result = if emptied {
                self.remove_empty(&path)
            } else {
                left.push((path.clone(), true));
                self.empty(&path).map(|below| {
                    left.extend(below.into_iter().map(|directory| (directory, false)));
                })
            };
            result.map_err(failed)?;
        }
        Ok(())
    }

    /// Removes all but the directories, which it returns.
    fn empty(&self, path: &Path) -> rustix::io::Result<Vec<PathBuf>> {
        let directory = self.root.directory(path)?;
        let mut below = Vec::new();
        for name in entry::names(&directory)? {
            if !unlink(&directory, &name)? {
                below.push(path.join(OsStr::from_bytes(&name)));
            }
        }
        Ok(below)
    }

    fn remove_empty(&self, path: &Path) -> rustix::io::Result<()> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Errno::INVAL);
        };
        fs::unlinkat(self.root.directory(parent)?, name, AtFlags::REMOVEDIR)
    }

    /// Gives the current directory its looks; its time follows when it is
    /// left.
    fn look_like(&mut self, meta: &Meta) -> Result<(), RootfsError> {
        let handle = self.here()?;
        handle.apply(meta).map_err(|e| self.failed("set the attributes of", e))
    }

    fn here(&mut self) -> Result<Handle, RootfsError> {
        let opened = Handle::open(self.directory()?, b".");
        opened.map_err(|e| self.failed("open", e))
    }

    fn directory(&mut self) -> Result<&OwnedFd, RootfsError> {
        if self.directory.is_none() {
            let opened = self.root.directory(&self.path);
            self.directory = Some(opened.map_err(|e| self.failed("open the directory", e))?);
        }
        Ok(self.directory.as_ref().expect("opened above"))
    }

    fn type_of(&mut self, name: &Name) -> Result<Option<FileType>, RootfsError> {
        let directory = self.directory()?;
        match fs::statat(directory, name.as_bytes(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(self.failed_at("examine", name, errno)),
        }
    }

    fn next_name(&mut self, name: &Name) -> Result<(), RootfsError> {
        self.no_file()?;
        let path = self.path.join(name.as_path());
        let length = path.as_os_str().len();
        if length > MAX_PATH {
            let limit = MAX_PATH as u64;
            let what = "the length of a path";
            return Err(self.malformed(Problem::Limit { what, value: length as u64, limit }));
        }
        let last = self.levels.last_mut().and_then(|level| level.last.replace(name.clone()));
        match last {
            Some(last) if last >= *name => {
                let name = printable(name.as_bytes());
                let after = printable(last.as_bytes());
                Err(self.malformed(Problem::Order { name, after }))
            }
            _ => Ok(()),
        }
    }

    fn no_file(&self) -> Result<(), RootfsError> {
        match self.file {
            None => Ok(()),
            Some(_) => Err(self.malformed(Problem::Place("a record inside of a file"))),
        }
    }

    /// Names the entry the stream had come to.
    pub(crate) fn malformed(&self, problem: Problem) -> RootfsError {
        let mut at = Path::new("/").join(&self.path);
        if let Some(last) = self.levels.last().and_then(|level| level.last.as_ref()) {
            at.push(last.as_path());
        }
        RootfsError::Malformed { at, problem }
    }

    fn failed(&self, doing: &'static str, errno: Errno) -> RootfsError {
        RootfsError::io(doing, self.base.join(&self.path))(errno)
    }

    fn failed_at(&self, doing: &'static str, name: &Name, errno: Errno) -> RootfsError {
        RootfsError::io(doing, self.base.join(&self.path).join(name.as_path()))(errno)
    }

    fn failed_in_file(&self, doing: &'static str, errno: Errno) -> RootfsError {
        match &self.file {
            Some(file) => self.failed_at(doing, &file.name, errno),
            None => self.failed(doing, errno),
        }
    }
}

/// A file that was not completed is not left behind.
impl Drop for Tree {
    fn drop(&mut self) {
        let Some(file) = self.file.take() else { return };
        let Ok(directory) = self.root.directory(&self.path) else { return };
        let lies_at = file.temporary.as_deref().unwrap_or(file.name.as_bytes());
        let _ = fs::unlinkat(&directory, lies_at, AtFlags::empty());
    }
}

fn create(directory: &OwnedFd, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)
}

/// False if it is a directory; what is not there counts as removed.
fn unlink(directory: &OwnedFd, name: &[u8]) -> rustix::io::Result<bool> {
    match fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::ISDIR) => Ok(false),
        Err(errno) => Err(errno),
    }
}
