use std::{
    io::Write,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt, symlink},
        net::UnixListener,
    },
    path::Path,
    process::Stdio,
};

use flate2::{Compression, write::GzEncoder};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::*;

/// Everything that a container's tmpfs can have.
fn zoo(dir: &Path) {
    fs::create_dir_all(dir.join("a/b")).unwrap();
    fs::write(dir.join("a/b/text"), vec![b'x'; 70_000]).unwrap();
    fs::set_permissions(dir.join("a/b/text"), PermissionsExt::from_mode(0o4751)).unwrap();
    std::os::unix::fs::chown(dir.join("a/b/text"), Some(1000), Some(3_000_000_000)).unwrap();
    fs::set_permissions(dir.join("a/b/text"), PermissionsExt::from_mode(0o4751)).unwrap();
    fs::hard_link(dir.join("a/b/text"), dir.join("again")).unwrap();
    fs::write(dir.join("empty"), b"").unwrap();
    fs::write(dir.join("long".repeat(40)), b"long").unwrap();
    symlink("/etc/no/such", dir.join("link")).unwrap();
    symlink("l".repeat(200), dir.join("longer")).unwrap();
    let (rw, fifo) = (Mode::from_bits_truncate(0o622), dir.join("fifo"));
    mknod(&fifo, SFlag::S_IFIFO, rw, 0).unwrap();
    mknod(&dir.join("null"), SFlag::S_IFCHR, rw, makedev(1, 3)).unwrap();
    mknod(&dir.join("disk"), SFlag::S_IFBLK, rw, makedev(259, 1_000)).unwrap();
    UnixListener::bind(dir.join("socket")).unwrap();
    fs::set_permissions(dir.join("a"), PermissionsExt::from_mode(0o1777)).unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    File::open(dir.join("a")).unwrap().set_modified(old).unwrap();
}

/// One line for each file, sorted, without the socket, which nobody saves.
fn list(dir: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(path) = waiting.pop() {
        let meta = path.symlink_metadata().unwrap();
        if meta.file_type().is_socket() {
            continue;
        }
        let content = match () {
            () if meta.is_file() => format!("{:?}", fs::read(&path).unwrap().len()),
            () if meta.is_symlink() => fs::read_link(&path).unwrap().display().to_string(),
            () => String::new(),
        };
        let links = if meta.is_dir() { 0 } else { meta.nlink() };
        let name = path.strip_prefix(dir).unwrap().display().to_string();
        // The root holds the socket on one side only.
        let time = if name.is_empty() { 0 } else { meta.mtime() };
        let (mode, uid, gid, rdev) = (meta.mode(), meta.uid(), meta.gid(), meta.rdev());
        lines.push(format!("{name} {mode:o} {uid}:{gid} {links} {rdev} {time} {content}"));
        if meta.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    lines.sort();
    lines
}

fn words(words: &[&str], more: &[&OsStr]) -> Vec<OsString> {
    words.iter().map(|word| OsString::from(*word)).chain(more.iter().map(OsString::from)).collect()
}

fn gnu(arguments: Vec<OsString>, stdin: Stdio, stdout: Stdio) {
    let status = Command::new("tar").args(arguments).stdin(stdin).stdout(stdout).status().unwrap();
    assert!(status.success());
}

#[test]
fn either_tar_reads_what_the_other_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    zoo(&at("zoo"));
    create::create(&at("zoo"), &File::create(at("ours")).unwrap()).unwrap();
    let line = words(&CREATE, &[at("zoo").as_os_str(), OsStr::new(".")]);
    gnu(line, Stdio::null(), File::create(at("gnus")).unwrap().into());

    for archive in ["ours", "gnus"] {
        let (by_us, by_gnu) = (at(&format!("{archive}.us")), at(&format!("{archive}.gnu")));
        fs::create_dir(&by_us).unwrap();
        fs::create_dir(&by_gnu).unwrap();
        extract::extract(&File::open(at(archive)).unwrap(), &by_us).unwrap();
        let line = words(&EXTRACT, &[by_gnu.as_os_str()]);
        gnu(line, File::open(at(archive)).unwrap().into(), Stdio::null());
        assert_eq!(list(&by_us), list(&at("zoo")), "{archive} by us");
        assert_eq!(list(&by_gnu), list(&at("zoo")), "{archive} by tar");
        // As after a first try that broke off: what is there is replaced.
        extract::extract(&File::open(at(archive)).unwrap(), &by_us).unwrap();
        assert_eq!(list(&by_us), list(&at("zoo")), "{archive} again");
    }
}

#[test]
fn holes_are_left_to_the_real_one() {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("holes")).unwrap().set_len(1 << 40).unwrap();
    let archive = tempfile::tempfile().unwrap();
    let error = create::create(dir.path(), &archive).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
}

#[test]
fn no_path_leads_out() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let evil = |name: &str, link: Option<&Path>| {
        let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::none()));
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        if let Some(link) = link {
            header.set_entry_type(tar::EntryType::Symlink);
            builder.append_link(&mut header, "way", link).unwrap();
        }
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(1);
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, &b"x"[..]).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&builder.into_inner().unwrap().finish().unwrap()).unwrap();
        file.rewind().unwrap();
        file
    };
    let absolute = outside.join("file").display().to_string();
    for (name, link) in [
        ("../outside/file", None),
        (absolute.as_str(), None),
        ("way/file", Some(outside.as_path())),
        ("way/file", Some(Path::new("../outside"))),
    ] {
        let inside = dir.path().join("inside");
        fs::create_dir(&inside).unwrap();
        assert!(extract::extract(&evil(name, link), &inside).is_err(), "{name}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{name}");
        fs::remove_dir_all(inside).unwrap();
    }
}

fn packed(entries: impl FnOnce(&mut tar::Builder<GzEncoder<Vec<u8>>>)) -> File {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    entries(&mut builder);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&builder.into_inner().unwrap().finish().unwrap()).unwrap();
    file.rewind().unwrap();
    file
}

fn header(kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_path("d").unwrap();
    for set in [tar::Header::set_uid, tar::Header::set_gid, tar::Header::set_mtime] {
        set(&mut header, 0);
    }
    header.set_mode(0o755);
    header.set_size(size);
    header.set_cksum();
    header
}

/// A thousand times as long as it travels.
#[test]
fn no_name_is_longer_than_names_are() {
    for kind in [tar::EntryType::GNULongName, tar::EntryType::GNULongLink] {
        let dir = tempfile::tempdir().unwrap();
        let archive = packed(|archive| {
            let name = vec![b'a'; 1 << 20];
            archive.append(&header(kind, name.len() as u64), &name[..]).unwrap();
            archive.append(&header(tar::EntryType::Directory, 0), &b""[..]).unwrap();
        });
        let error = extract::extract(&archive, dir.path()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidFilename, "{kind:?}: {error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{kind:?}");
    }
}

#[test]
fn directories_without_end_are_left_to_the_real_one() {
    let dir = tempfile::tempdir().unwrap();
    let of = |entries: usize| {
        let header = header(tar::EntryType::Directory, 0);
        packed(|archive| (0..entries).for_each(|_| archive.append(&header, &b""[..]).unwrap()))
    };
    extract::extract(&of(100), dir.path()).unwrap();
    let error = extract::extract(&of((1 << 16) + 1), dir.path()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
}

#[test]
fn only_crius_two_lines_are_served() {
    let dir = OsStr::new("/proc/self/fd/0");
    let create = words(&CREATE, &[dir, OsStr::new(".")]);
    assert_eq!(command(&create), Some(Work::Create(dir.into())));
    assert_eq!(command(&words(&EXTRACT, &[dir])), Some(Work::Extract(dir.into())));
    for other in [
        words(&CREATE, &[dir, OsStr::new("..")]),
        words(&CREATE, &[dir]),
        words(&EXTRACT, &[]),
        words(&EXTRACT[1..], &[dir]),
        words(&["--version"], &[]),
        Vec::new(),
    ] {
        assert_eq!(command(&other), None, "{other:?}");
    }
}
