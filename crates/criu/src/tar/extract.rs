//! An archive into a directory, as `tar --extract` does it for root.
//!
//! The archive comes from another machine and the directory will be a
//! container's: no path may lead out of it, through `..` or through a link
//! that the archive itself has made. Every parent is opened with
//! `RESOLVE_BENEATH` and without following links.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStringExt,
            fs::{OpenOptionsExt, fchown},
        },
    },
    path::{Component, Path, PathBuf},
};

use flate2::read::GzDecoder;
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2},
    sys::{
        stat::{
            FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmod, fchmodat, futimens, makedev,
            mkdirat, mknodat, utimensat,
        },
        time::TimeSpec,
    },
    unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat},
};
use tar::{Archive, Entry, EntryType, Header};

use super::not_ours;

/// PATH_MAX, with the NUL that GNU's tar writes behind it.
const MAX_NAME: u64 = 4096;

/// What an archive has: directories are remembered to the end, a path each. A
/// container's tmpfs with more of them is for the real tar.
const MAX_ENTRIES: usize = 1 << 16;

pub fn extract(archive: &File, dir: &Path) -> io::Result<()> {
    let mut options = File::options();
    let root = options.read(true).custom_flags(nix::libc::O_DIRECTORY).open(dir)?;
    let root = OwnedFd::from(root);
    // A directory's time changes with what is put into it: last comes first.
    let mut dirs: Vec<(PathBuf, Header)> = Vec::new();
    let mut archive = Archive::new(GzDecoder::new(io::BufReader::with_capacity(1 << 16, archive)));
    // Raw: what stands in for a long name is read whole otherwise, however
    // long it is.
    let (mut long_path, mut long_link) = (None, None);
    for (number, entry) in archive.entries()?.raw(true).enumerate() {
        if number == MAX_ENTRIES {
            return Err(not_ours());
        }
        let mut entry = entry?;
        let header = entry.header().clone();
        match header.entry_type() {
            EntryType::GNULongName => {
                long_path = Some(long_name(&mut entry)?);
                continue;
            }
            EntryType::GNULongLink => {
                long_link = Some(long_name(&mut entry)?);
                continue;
            }
            _ => {}
        }
        let path = match long_path.take() {
            Some(path) => path,
            None => entry.path()?.into_owned(),
        };
        let link = match long_link.take() {
            Some(link) => Some(link),
            None => entry.link_name()?.map(|link| link.into_owned()),
        };
        let (parent, name) = match place(&root, &path)? {
            Some(place) => place,
            None => {
                dirs.push((PathBuf::from("."), header));
                continue;
            }
        };
        match (header.entry_type(), link) {
            (EntryType::Directory, _) => {
                made(mkdirat(&parent, name, Mode::S_IRWXU))?;
                dirs.push((path, header));
            }
            (EntryType::Regular | EntryType::Continuous, _) => {
                file(&parent, name, &header, &mut entry)?;
            }
            (EntryType::Symlink, Some(link)) => {
                anew(&parent, name, || symlinkat(link.as_path(), &parent, name))?;
                of_no_file(&parent, name, &header, false)?;
            }
            (EntryType::Link, Some(link)) => {
                let Some((from, first)) = place(&root, &link)? else { return Err(not_ours()) };
                anew(&parent, name, || linkat(&from, first, &parent, name, AtFlags::empty()))?;
            }
            (EntryType::Char, _) => node(&parent, name, &header, SFlag::S_IFCHR)?,
            (EntryType::Block, _) => node(&parent, name, &header, SFlag::S_IFBLK)?,
            (EntryType::Fifo, _) => node(&parent, name, &header, SFlag::S_IFIFO)?,
            // Sparse files, for one: the real tar writes them.
            _ => return Err(not_ours()),
        }
    }
    for (path, header) in dirs.iter().rev() {
        let dir = beneath(&root, path, OFlag::O_DIRECTORY)?;
        describe(&dir, header)?;
    }
    Ok(())
}

/// A name that has no room in a header. One that no file can have is not left
/// to the real tar, which would read it.
fn long_name(entry: &mut Entry<'_, impl Read>) -> io::Result<PathBuf> {
    if entry.size() > MAX_NAME {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    let mut name = Vec::new();
    entry.read_to_end(&mut name)?;
    if name.last() == Some(&0) {
        name.pop();
    }
    Ok(OsString::from_vec(name).into())
}

/// The directory that the path leads to and the name in there; `None` for the
/// root itself.
fn place<'a>(root: &OwnedFd, path: &'a Path) -> io::Result<Option<(OwnedFd, &'a OsStr)>> {
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    if !path.components().all(plain) {
        return Err(not_ours());
    }
    let Some(name) = path.file_name() else { return Ok(None) };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = beneath(root, parent.unwrap_or(Path::new(".")), OFlag::O_DIRECTORY)?;
    Ok(Some((parent, name)))
}

fn beneath(root: &OwnedFd, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_RDONLY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(root, path, how)?)
}

fn file(parent: &OwnedFd, name: &OsStr, header: &Header, bytes: &mut impl Read) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let fd = anew(parent, name, || openat(parent, name, flags, Mode::S_IRUSR | Mode::S_IWUSR))?;
    let mut file = File::from(fd);
    io::copy(bytes, &mut file)?;
    describe(&OwnedFd::from(file), header)
}

fn node(parent: &OwnedFd, name: &OsStr, header: &Header, kind: SFlag) -> io::Result<()> {
    let number = |part: io::Result<Option<u32>>| Ok::<_, io::Error>(part?.unwrap_or(0).into());
    let device = match kind {
        SFlag::S_IFIFO => 0,
        _ => makedev(number(header.device_major())?, number(header.device_minor())?),
    };
    anew(parent, name, || mknodat(parent, name, kind, Mode::S_IRUSR, device))?;
    of_no_file(parent, name, header, true)
}

/// Makes something where nothing was, or where something else was before.
fn anew<T>(parent: &OwnedFd, name: &OsStr, make: impl Fn() -> nix::Result<T>) -> io::Result<T> {
    match make() {
        Err(Errno::EEXIST) => {
            unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?;
            Ok(make()?)
        }
        other => Ok(other?),
    }
}

fn made(answer: nix::Result<()>) -> io::Result<()> {
    match answer {
        Err(Errno::EEXIST) => Ok(()),
        other => Ok(other?),
    }
}

/// Owner, rights and time of what can be opened. The owner first: a change of
/// it takes away set-user-id.
fn describe(fd: &OwnedFd, header: &Header) -> io::Result<()> {
    let (uid, gid, mode, time) = attributes(header)?;
    fchown(fd, Some(uid), Some(gid))?;
    fchmod(fd.as_fd(), mode)?;
    Ok(futimens(fd, &time, &time)?)
}

/// The same of what must not be opened.
fn of_no_file(parent: &OwnedFd, name: &OsStr, header: &Header, rights: bool) -> io::Result<()> {
    let (uid, gid, mode, time) = attributes(header)?;
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    fchownat(parent, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if rights {
        fchmodat(parent, name, mode, FchmodatFlags::FollowSymlink)?;
    }
    Ok(utimensat(parent, name, &time, &time, UtimensatFlags::NoFollowSymlink)?)
}

fn attributes(header: &Header) -> io::Result<(u32, u32, Mode, TimeSpec)> {
    let id = |id: u64| u32::try_from(id).map_err(|_| not_ours());
    let mode = Mode::from_bits_truncate(header.mode()?);
    let seconds = header.mtime()?.try_into().map_err(|_| not_ours())?;
    Ok((id(header.uid()?)?, id(header.gid()?)?, mode, TimeSpec::new(seconds, 0)))
}
