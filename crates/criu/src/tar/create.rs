//! A directory into an archive, as `tar --create --one-file-system` does it.

use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io::{self, BufWriter, Write},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use flate2::{Compression, write::GzEncoder};
use nix::sys::stat::{major, minor};
use tar::{Builder, EntryType, Header};

use super::not_ours;

type Archive<'a> = Builder<GzEncoder<BufWriter<&'a File>>>;

/// Nothing in `dir` changes meanwhile: the container is frozen.
pub fn create(dir: &Path, archive: &File) -> io::Result<()> {
    let buffer = BufWriter::with_capacity(1 << 16, archive);
    let mut builder = Builder::new(GzEncoder::new(buffer, Compression::none()));
    let device = fs::metadata(dir)?.dev();
    let mut linked = HashMap::new();
    let mut waiting = vec![PathBuf::from(".")];
    while let Some(name) = waiting.pop() {
        let path = dir.join(&name);
        let meta =
            if name == Path::new(".") { fs::metadata(&path)? } else { path.symlink_metadata()? };
        append(&mut builder, &path, &name, &meta, &mut linked)?;
        // Of what is mounted here only the mount point belongs to us.
        if meta.is_dir() && meta.dev() == device {
            for entry in fs::read_dir(&path)? {
                waiting.push(name.join(entry?.file_name()));
            }
        }
    }
    builder.into_inner()?.finish()?.into_inner()?.flush()
}

fn append(
    builder: &mut Archive<'_>,
    path: &Path,
    name: &Path,
    meta: &Metadata,
    linked: &mut HashMap<u64, PathBuf>,
) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(meta.mode() & 0o7777);
    header.set_uid(meta.uid().into());
    header.set_gid(meta.gid().into());
    header.set_mtime(meta.mtime().max(0) as u64);
    header.set_size(0);
    if meta.nlink() > 1 && !meta.is_dir() {
        if let Some(first) = linked.get(&meta.ino()) {
            header.set_entry_type(EntryType::Link);
            return builder.append_link(&mut header, name, first);
        }
        linked.insert(meta.ino(), name.to_owned());
    }
    let kind = meta.file_type();
    if kind.is_file() {
        // Holes can be larger than memory.
        if meta.blocks() * 512 < meta.size() {
            return Err(not_ours());
        }
        header.set_entry_type(EntryType::Regular);
        header.set_size(meta.size());
        return builder.append_data(&mut header, name, File::open(path)?);
    }
    if kind.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        return builder.append_link(&mut header, name, fs::read_link(path)?);
    }
    // Sockets are CRIU's to restore; tar leaves them out, too.
    if kind.is_socket() {
        return Ok(());
    }
    let numbered = kind.is_char_device() || kind.is_block_device();
    header.set_entry_type(match () {
        () if kind.is_dir() => EntryType::Directory,
        () if kind.is_fifo() => EntryType::Fifo,
        () if kind.is_char_device() => EntryType::Char,
        () if kind.is_block_device() => EntryType::Block,
        () => return Err(not_ours()),
    });
    if numbered {
        let number = |number: u64| u32::try_from(number).map_err(|_| not_ours());
        header.set_device_major(number(major(meta.rdev()))?)?;
        header.set_device_minor(number(minor(meta.rdev()))?)?;
    }
    builder.append_data(&mut header, name, io::empty())
}
