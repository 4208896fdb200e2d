//! What CRIU has to save beside the private memory of the processes, inside
//! the pause. Estimates, from what the kernel tells about each process; one
//! that ends meanwhile counts for nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
};

use nix::sys::{
    statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs},
    statvfs::statvfs,
};
use transship_api::control::WatchResponse;

use crate::held;

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Of shared objects (memfd, SysV, anonymous shared memory), each once.
    shared_bytes: u64,
    /// Of those that CRIU fills itself: SysV segments and shared huge pages,
    /// and all of them where the library is missing by which it is given them.
    filled_bytes: u64,
    /// Of private huge pages.
    huge_bytes: u64,
    tmpfs_bytes: u64,
    tmpfs_mounts: u32,
}

pub fn survey(pids: &[i32], init: i32) -> Surroundings {
    let mut found = Surroundings::default();
    let devices = tmpfs(init, &mut found);
    let mut shared = BTreeMap::new();
    for pid in pids {
        shared_objects(*pid, &devices, &mut shared);
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        found.huge_bytes += kibibytes(&rollup, "Private_Hugetlb:");
    }
    let everything = held::library().is_none();
    found.shared_bytes = shared.values().map(|object| object.bytes).sum();
    let filled = shared.values().filter(|object| everything || object.filled);
    found.filled_bytes = filled.map(|object| object.bytes).sum();
    found
}

impl Surroundings {
    pub fn tell(self, response: &mut WatchResponse) {
        response.shared_bytes = self.shared_bytes;
        response.filled_bytes = self.filled_bytes;
        response.huge_bytes = self.huge_bytes;
        response.tmpfs_bytes = self.tmpfs_bytes;
        response.tmpfs_mounts = self.tmpfs_mounts;
    }
}

/// The tmpfs mounts of the container; their device numbers. The files of each
/// file system travel once.
fn tmpfs(init: i32, found: &mut Surroundings) -> BTreeSet<u64> {
    let table = fs::read_to_string(format!("/proc/{init}/mountinfo")).unwrap_or_default();
    let mut devices = BTreeSet::new();
    for point in tmpfs_points(&table) {
        found.tmpfs_mounts += 1;
        let path = format!("/proc/{init}/root{point}");
        let (Ok(meta), Ok(size)) = (fs::metadata(&path), statvfs(path.as_str())) else { continue };
        if devices.insert(meta.dev()) {
            let used = size.blocks().saturating_sub(size.blocks_free());
            found.tmpfs_bytes += used.saturating_mul(size.fragment_size());
        }
    }
    devices
}

/// Mount points, from mountinfo: fields as in proc_pid_mountinfo(5).
fn tmpfs_points(table: &str) -> impl Iterator<Item = &str> {
    table.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let kind = file_system.split(' ').next()?;
        (kind == "tmpfs").then(|| mount.split(' ').nth(4)).flatten()
    })
}

struct Object {
    bytes: u64,
    filled: bool,
}

/// By device and inode. Mapped files of a tmpfs mount are counted there.
fn shared_objects(pid: i32, mounts: &BTreeSet<u64>, found: &mut BTreeMap<(u64, u64), Object>) {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    for (range, is_segment) in shared_ranges(&maps) {
        let link = format!("/proc/{pid}/map_files/{range}");
        let link = Path::new(&link);
        let (Ok(meta), Ok(on)) = (fs::metadata(link), statfs(link)) else { continue };
        let of_memory = [TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&on.filesystem_type());
        if of_memory && !mounts.contains(&meta.dev()) {
            let filled = is_segment || on.filesystem_type() == HUGETLBFS_MAGIC;
            let bytes = meta.blocks().saturating_mul(512);
            found.insert((meta.dev(), meta.ino()), Object { bytes, filled });
        }
    }
}

/// `start-end` of shared mappings of an object, and whether that is a SysV
/// segment.
fn shared_ranges(maps: &str) -> impl Iterator<Item = (&str, bool)> {
    maps.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (range, permissions) = (fields.next()?, fields.next()?);
        let inode = fields.nth(2)?;
        let is_segment = fields.next().is_some_and(|name| name.starts_with("/SYSV"));
        (permissions.ends_with('s') && inode != "0").then_some((range, is_segment))
    })
}

fn kibibytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.trim().strip_suffix("kB"));
    number.and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let table = "\
22 1 0:20 / / rw - overlay overlay rw\n\
23 22 0:21 / /dev rw,nosuid shared:1 - tmpfs tmpfs rw,size=65536k\n\
24 22 0:22 / /proc rw - proc proc rw\n\
25 23 0:23 / /dev/shm rw - tmpfs shm rw\n";
        assert_eq!(tmpfs_points(table).collect::<Vec<_>>(), ["/dev", "/dev/shm"]);
        let maps = "\
7f00-7f10 rw-s 00000000 00:01 99                         /memfd:x (deleted)\n\
7f20-7f30 rw-p 00000000 00:00 0 \n\
7f40-7f50 rw-s 00000000 00:00 0 \n\
7f60-7f70 r--s 00000000 fe:00 7                          /usr/lib/locale\n\
7f80-7f90 rw-s 00000000 00:01 8                          /SYSV0000002a (deleted)\n";
        assert_eq!(
            shared_ranges(maps).collect::<Vec<_>>(),
            [("7f00-7f10", false), ("7f60-7f70", false), ("7f80-7f90", true)]
        );
        assert_eq!(
            kibibytes("Rss: 5 kB\nPrivate_Hugetlb:     2048 kB\n", "Private_Hugetlb:"),
            2 << 20
        );
    }
}
