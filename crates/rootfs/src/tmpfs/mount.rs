//! One tmpfs: held and read on the source, made on the target.

use std::{
    fmt,
    io::{self, Read},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self, AtFlags, CWD, Mode, OFlags, StatxFlags},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
        fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
        open_tree,
    },
};

use super::{Left, Options, Tmpfs, Why};
use crate::{Layer, Receiver, RootfsError, Totals, send_frozen};

/// Read at once from a stream that lies in memory.
const PIECE: usize = 1 << 20;

/// A tmpfs of a container, within reach wherever it is mounted and whatever
/// is mounted on it.
#[derive(Debug)]
pub struct Held {
    mount: Tmpfs,
    /// A mount of the same file system, which nobody else sees.
    tree: OwnedFd,
}

impl Tmpfs {
    /// Only on a thread that is in the container's mount namespace.
    pub fn hold(self) -> Result<Held, Left> {
        match open(&self) {
            Ok(tree) => Ok(Held { mount: self, tree }),
            Err(errno) => {
                let why = Why::Hidden(io::Error::from(errno).to_string());
                Err(Left { point: self.point().into(), why })
            }
        }
    }
}

fn open(mount: &Tmpfs) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let there = fs::open(mount.point(), flags, Mode::empty())?;
    // Not what lies above it, nor what a link of the container leads to.
    let stat = fs::statx(&there, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    if stat.stx_mask & StatxFlags::MNT_ID.bits() == 0 || stat.stx_mnt_id != mount.id {
        return Err(Errno::STALE);
    }
    let clone = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(&there, "", clone)
}

impl Held {
    pub fn mount(&self) -> &Tmpfs {
        &self.mount
    }

    /// All that is in it; the container stands still.
    pub fn send(
        &self,
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<Totals, RootfsError> {
        let layer = Layer::whole(&own_path(&self.tree));
        Ok(send_frozen(&layer, None, sink)?.1)
    }
}

/// Makes a tmpfs with what `contents`, a stream of [`Held::send`], brings, and
/// mounts it on the directory `at`, where nothing of it was before.
///
/// Its memory is charged to whoever calls this.
pub fn make(
    source: &str,
    options: &Options,
    at: &Path,
    contents: &mut dyn Read,
) -> Result<Totals, RootfsError> {
    let failed = |doing| RootfsError::io(doing, at);
    let context = configured(source, options).map_err(failed("set up a tmpfs for"))?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
    let mount = mount.map_err(failed("make a tmpfs for"))?;
    let mut receiver = Receiver::new(&own_path(&mount))?;
    let mut piece = vec![0; PIECE];
    loop {
        let read = contents.read(&mut piece).map_err(|source| RootfsError::Io {
            doing: "read the contents of",
            path: at.into(),
            source,
        })?;
        if read == 0 {
            break;
        }
        receiver.feed(&piece[..read])?;
    }
    let totals = receiver.finish()?;
    if options.read_only {
        let done = fsconfig_set_flag(&context, "ro").and_then(|()| fsconfig_reconfigure(&context));
        done.map_err(failed("protect the tmpfs for"))?;
    }
    move_mount(&mount, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(failed("mount a tmpfs on"))?;
    Ok(totals)
}

fn configured(source: &str, options: &Options) -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", source)?;
    for (name, value) in &options.others {
        match value {
            Some(value) => fsconfig_set_string(&context, name.as_str(), value.as_str())?,
            None => fsconfig_set_flag(&context, name.as_str())?,
        }
    }
    fsconfig_create(&context)?;
    Ok(context)
}

fn own_path(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.point.display(), self.why)
    }
}
