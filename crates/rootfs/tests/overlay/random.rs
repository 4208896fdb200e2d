//! Random life inside a container: every operation a program can do to its
//! files, on a few names, so that they meet often.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat, setxattr};

/// xorshift64*: the same operations for the same seed, on every machine.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    fn name(&mut self) -> &'static str {
        ["a", "b", "c", "d", "with space", "ü", ".hidden"][self.below(7) as usize]
    }

    fn path(&mut self, root: &Path) -> PathBuf {
        let mut path = root.to_path_buf();
        for _ in 0..=self.below(3) {
            path.push(self.name());
        }
        path
    }

    fn bytes(&mut self) -> Vec<u8> {
        let length = self.below(5000) as usize;
        vec![self.below(256) as u8; length]
    }
}

/// Most operations meet something they cannot be done to; those fail, and
/// that is as good.
pub fn step(root: &Path, dice: &mut Dice) {
    let path = dice.path(root);
    let other = dice.path(root);
    let _ = match dice.below(22) {
        0..=2 => write(&path, dice),
        3 | 4 => fs::create_dir_all(&path),
        5 => fs::remove_file(&path),
        6 | 7 => fs::remove_dir_all(&path),
        8..=10 => fs::rename(&path, &other),
        11 => fs::hard_link(&path, &other),
        12 => symlink(&other, &path),
        13 => append(&path, dice),
        14 => sparse(&path, dice),
        15 => {
            let mode = dice.below(0o10000) as u32;
            // Links to elsewhere lead nowhere below the root; do not follow.
            if path.is_symlink() {
                Ok(())
            } else {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            }
        }
        16 if !path.is_symlink() => {
            chown(&path, Some(dice.below(5) as u32), Some(dice.below(5) as u32))
        }
        17 => node(&path, dice),
        18 | 19 => attribute(&path, dice),
        20 => hidden_again(&path),
        _ => regular(OpenOptions::new().read(true), &path).and_then(|file| {
            let at = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(dice.below(1 << 60));
            file.set_modified(at)
        }),
    };
}

/// Never waits for the other end of a fifo, and touches no device.
fn regular(how: &mut OpenOptions, path: &Path) -> std::io::Result<File> {
    let file = how.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() { Ok(file) } else { Err(std::io::ErrorKind::InvalidInput.into()) }
}

fn write(path: &Path, dice: &mut Dice) -> std::io::Result<()> {
    let file = regular(OpenOptions::new().write(true).create(true).truncate(true), path)?;
    file.write_all_at(&dice.bytes(), 0)
}

fn append(path: &Path, dice: &mut Dice) -> std::io::Result<()> {
    use std::io::Write;
    regular(OpenOptions::new().append(true), path)?.write_all(&dice.bytes())
}

fn sparse(path: &Path, dice: &mut Dice) -> std::io::Result<()> {
    let file = regular(OpenOptions::new().write(true).create(true), path)?;
    file.set_len((2 << 20) + dice.below(6 << 20))?;
    file.write_all_at(&dice.bytes(), dice.below(2 << 20))
}

fn node(path: &Path, dice: &mut Dice) -> std::io::Result<()> {
    let (kind, device) = match dice.below(4) {
        0 => (FileType::Fifo, 0),
        1 => (FileType::Socket, 0),
        2 => (FileType::CharacterDevice, makedev(1, 3)),
        // For local use: no driver answers to it.
        _ => (FileType::BlockDevice, makedev(240, dice.below(300) as u32)),
    };
    Ok(mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), device)?)
}

fn attribute(path: &Path, dice: &mut Dice) -> std::io::Result<()> {
    if path.is_symlink() {
        return Ok(());
    }
    let none = XattrFlags::empty();
    match dice.below(4) {
        0 => setxattr(path, "user.note", &dice.bytes()[..], none)?,
        1 => rustix::fs::removexattr(path, "user.note")?,
        // CAP_NET_BIND_SERVICE, permitted and effective, version 2.
        2 => {
            let mut capability = vec![1, 0, 0, 2, 0, 4, 0, 0];
            capability.resize(20, 0);
            setxattr(path, "security.capability", &capability, none)?;
        }
        // u::rwx u:1000:rw g::rx m::rwx o::-, for itself or for what comes.
        _ => {
            let mut acl = 2u32.to_le_bytes().to_vec();
            for (tag, permissions, id) in [
                (1u16, 7u16, u32::MAX),
                (2, 6, 1000),
                (4, 5, u32::MAX),
                (16, 7, u32::MAX),
                (32, 0, u32::MAX),
            ] {
                acl.extend(tag.to_le_bytes());
                acl.extend(permissions.to_le_bytes());
                acl.extend(id.to_le_bytes());
            }
            let kind = ["system.posix_acl_access", "system.posix_acl_default"];
            setxattr(path, kind[dice.below(2) as usize], &acl, none)?;
        }
    }
    Ok(())
}

/// Removes a directory and makes it anew: opaque if the image has one.
fn hidden_again(path: &Path) -> std::io::Result<()> {
    fs::remove_dir_all(path)?;
    fs::create_dir(path)?;
    fs::write(path.join("a"), "new")
}
