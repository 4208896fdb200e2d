//! /proc/PID/maps: what a process has mapped.

use std::{fs, io, path::Path};

use transship_types::PageRange;

/// One line of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub range: PageRange,
    pub writable: bool,
    pub executable: bool,
    /// Copied on write: its changed pages belong to this process alone.
    pub private: bool,
    /// Where nothing was changed, it shows a file.
    pub file: bool,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// What a program mapped: anonymous memory, files, stacks.
    Ordinary,
    /// The kernel's own code and data (vdso, vvar, uprobes).
    Kernel,
}

impl Mapping {
    /// Whether its pages move with the process.
    pub fn moves(&self) -> bool {
        self.private && self.kind == Kind::Ordinary
    }
}

/// The mappings in order of address; none of a process that is gone or has
/// no memory any more.
pub(crate) fn of(pid: i32) -> io::Result<Vec<Mapping>> {
    read(Path::new(&format!("/proc/{pid}/maps")))
}

/// The same from any file of that form.
pub(crate) fn read(maps: &Path) -> io::Result<Vec<Mapping>> {
    match fs::read(maps) {
        Ok(text) => Ok(parse(&text)),
        Err(error) if gone(&error) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Whether an error of a file below /proc/PID means that the process ended.
pub(crate) fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Where the kernel's vdso is.
pub(crate) fn vdso(pid: i32) -> io::Result<Option<PageRange>> {
    let text = fs::read(format!("/proc/{pid}/maps"))?;
    Ok(lines(&text).find(|(_, name)| *name == b"[vdso]").map(|(mapping, _)| mapping.range))
}

fn parse(text: &[u8]) -> Vec<Mapping> {
    lines(text).map(|(mapping, _)| mapping).collect()
}

/// Lines that are none of a user's address space (vsyscall) are left out.
/// Names are bytes: a file may be called anything.
fn lines(text: &[u8]) -> impl Iterator<Item = (Mapping, &[u8])> {
    text.split(|&byte| byte == b'\n').filter_map(line)
}

/// `start-end perms offset device inode   name`
fn line(line: &[u8]) -> Option<(Mapping, &[u8])> {
    let mut fields = line.splitn(6, |&byte| byte == b' ');
    let range = std::str::from_utf8(fields.next()?).ok()?;
    let permissions = fields.next()?;
    let inode = fields.nth(2)?;
    let name = fields.next().map_or(&b""[..], |name| name.trim_ascii_start());
    let (start, end) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let programs = [&b"[heap]"[..], b"[stack", b"[anon"];
    let kernel = name.starts_with(b"[") && !programs.iter().any(|own| name.starts_with(own));
    let mapping = Mapping {
        range: PageRange::new(address(start)?, address(end)?).ok()?,
        writable: permissions.get(1) == Some(&b'w'),
        executable: permissions.get(2) == Some(&b'x'),
        private: permissions.get(3) == Some(&b'p'),
        file: inode != b"0",
        kind: if kernel { Kind::Kernel } else { Kind::Ordinary },
    };
    Some((mapping, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &[u8] = b"\
55d0c0000000-55d0c0002000 r--p 00000000 fe:00 1234                       /usr/bin/with space
55d0c0002000-55d0c0003000 rw-p 00002000 fe:00 1234                       /usr/bin/with space
7f0000000000-7f0000021000 ---p 00000000 00:00 0 
7f0000100000-7f0000200000 rw-s 00000000 00:01 99                         /memfd:\xff (deleted)
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
7ffd00100000-7ffd00104000 r--p 00000000 00:00 0                          [vvar]
7ffd00104000-7ffd00105000 r--p 00000000 00:00 0                          [vvar_vclock]
7ffd00105000-7ffd00107000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    #[test]
    fn what_moves_is_private_and_not_the_kernels() {
        let maps = parse(MAPS);
        let starts = |maps: Vec<&Mapping>| maps.iter().map(|m| m.range.start()).collect::<Vec<_>>();
        assert_eq!(maps.len(), 8, "vsyscall is above every user address");
        assert_eq!(
            starts(maps.iter().filter(|mapping| mapping.moves()).collect()),
            [0x55d0_c000_0000, 0x55d0_c000_2000, 0x7f00_0000_0000, 0x7ffd_0000_0000],
        );
        assert_eq!(maps.iter().filter(|mapping| mapping.file).count(), 3);
        assert_eq!(
            starts(maps.iter().filter(|mapping| mapping.writable).collect()),
            [0x55d0_c000_2000, 0x7f00_0010_0000, 0x7ffd_0000_0000],
        );
    }

    #[test]
    fn our_own_vdso_is_found() {
        let own = std::process::id() as i32;
        assert!(vdso(own).unwrap().is_some());
        assert!(of(own).unwrap().iter().any(|mapping| mapping.kind == Kind::Kernel));
    }

    #[test]
    fn a_process_that_is_gone_has_none() {
        assert_eq!(of(i32::MAX).unwrap(), []);
    }
}
