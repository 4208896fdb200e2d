//! Opening directories below a root, and never anything else.
//!
//! The container may have written any symbolic link anywhere, and a stream
//! may name any path. Nothing here follows a link, leaves the root, or
//! crosses into another mount: the kernel is told so (openat2(2)), and where
//! it does not know that call (before Linux 5.6, or behind a seccomp filter)
//! the path is walked one component at a time with O_NOFOLLOW.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path},
};

use rustix::{
    fs::{self, CWD, Mode, OFlags, ResolveFlags},
    io::{Errno, Result},
};

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);

/// openat2 answers EAGAIN when a rename elsewhere might have moved the path
/// out of the root while it was walked; so many times in a row is an attack
/// or a storm, and an error either way.
const TRIES: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Openat2,
    Stepwise,
}

#[derive(Debug)]
pub(crate) struct Root {
    fd: OwnedFd,
    how: How,
}

impl Root {
    /// The root itself is the caller's word: links on the way to it are
    /// followed.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::openat(CWD, path, flags, Mode::empty())?;
        let mut root = Self { fd, how: How::Openat2 };
        match root.openat2(Path::new("."), DIRECTORY) {
            Err(Errno::NOSYS | Errno::PERM) => root.how = How::Stepwise,
            other => drop(other?),
        }
        Ok(root)
    }

    #[cfg(test)]
    pub(crate) fn stepwise(mut self) -> Self {
        self.how = How::Stepwise;
        self
    }

    /// Opens a directory by its path relative to the root; empty is the root.
    pub(crate) fn directory(&self, path: &Path) -> Result<OwnedFd> {
        self.open_at(path, DIRECTORY)
    }

    /// Opens a regular file for reading. Never blocks on a fifo.
    pub(crate) fn file(&self, path: &Path) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        self.open_at(path, flags)
    }

    fn open_at(&self, path: &Path, flags: OFlags) -> Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        match self.how {
            How::Openat2 => self.openat2(path, flags),
            How::Stepwise => self.step_by_step(path, flags),
        }
    }

    fn openat2(&self, path: &Path, flags: OFlags) -> Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let mut tries = 1;
        loop {
            match fs::openat2(&self.fd, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) if tries < TRIES => tries += 1,
                result => return result,
            }
        }
    }

    fn step_by_step(&self, path: &Path, flags: OFlags) -> Result<OwnedFd> {
        let through = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut at: Option<OwnedFd> = None;
        let mut components = path.components().peekable();
        while let Some(component) = components.next() {
            let name = match component {
                Component::Normal(name) => name,
                Component::CurDir => ".".as_ref(),
                // What the kernel answers to RESOLVE_BENEATH.
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                    return Err(Errno::XDEV);
                }
            };
            let flags = if components.peek().is_some() { through } else { flags };
            let parent = at.as_ref().map_or(self.fd.as_fd(), AsFd::as_fd);
            at = Some(fs::openat(parent, name, flags, Mode::empty())?);
        }
        at.ok_or(Errno::NOENT)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn nothing_outside_the_root_can_be_opened() {
        let outside = tempfile::tempdir().unwrap();
        let base = outside.path().join("root");
        std::fs::create_dir_all(base.join("a/b")).unwrap();
        std::fs::create_dir(outside.path().join("secret")).unwrap();
        symlink("..", base.join("up")).unwrap();
        symlink(outside.path(), base.join("away")).unwrap();
        symlink("a", base.join("inside")).unwrap();

        for root in [Root::open(&base).unwrap(), Root::open(&base).unwrap().stepwise()] {
            for good in ["", "a", "a/b"] {
                assert!(root.directory(Path::new(good)).is_ok(), "{good:?} with {:?}", root.how);
            }
            for bad in [
                "..",
                "a/../../secret",
                "/",
                "/etc",
                "up",
                "up/secret",
                "away/secret",
                // Even a link that stays inside: it could have been swapped.
                "inside/b",
                "inside",
                "/proc/self/cwd",
            ] {
                assert!(root.directory(Path::new(bad)).is_err(), "{bad:?} with {:?}", root.how);
            }
        }
    }
}
