//! How much memory somebody may take: what the machine has left, and what
//! control groups leave of it.
//!
//! Memory is charged to the control group of the process that touches it
//! first. Pages that wait on the target are the shim's; once they are placed
//! they are the container's. Both must have room.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

const HIERARCHY: &str = "/sys/fs/cgroup";

/// Bytes, and whose bound it is: `the machine`, or a control group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Room {
    pub bytes: u64,
    pub bound_by: String,
}

/// For a container that does not run yet; `cgroups_path` as its spec has it.
///
/// Its own group does not exist yet; the limit of that moves along and was
/// enough where it comes from.
pub fn for_container(cgroups_path: &str) -> io::Result<Room> {
    let machine = machine(&fs::read_to_string("/proc/meminfo")?)?;
    let hierarchy = Hierarchy::at(Path::new(HIERARCHY));
    let groups = hierarchy.rooms(&parent_of(cgroups_path));
    Ok(groups.into_iter().chain([machine]).min_by_key(|room| room.bytes).unwrap_or_default())
}

/// For the process that asks.
pub fn for_us() -> io::Result<Room> {
    let machine = machine(&fs::read_to_string("/proc/meminfo")?)?;
    let hierarchy = Hierarchy::at(Path::new(HIERARCHY));
    let own = hierarchy.group_in(&fs::read_to_string("/proc/self/cgroup")?);
    let groups = own.map(|own| hierarchy.rooms(&own)).unwrap_or_default();
    Ok(groups.into_iter().chain([machine]).min_by_key(|room| room.bytes).unwrap_or_default())
}

/// What processes may still take without swapping.
fn machine(meminfo: &str) -> io::Result<Room> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    let bytes = kib.and_then(|kib| kib.checked_mul(1024)).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "no MemAvailable in /proc/meminfo")
    })?;
    Ok(Room { bytes, bound_by: "the machine".into() })
}

/// Where the memory controller's groups lie.
struct Hierarchy {
    root: PathBuf,
    files: &'static Files,
}

impl Hierarchy {
    fn at(mounted: &Path) -> Self {
        // A host with version 1 has a directory for each controller.
        let v1 = mounted.join("memory");
        if v1.is_dir() {
            Self { root: v1, files: &VERSION_1 }
        } else {
            Self { root: mounted.to_owned(), files: &VERSION_2 }
        }
    }

    /// The group of a process, by its `/proc/PID/cgroup`.
    fn group_in(&self, cgroup: &str) -> Option<PathBuf> {
        let ours = |controllers: &str| match self.files.controller {
            "" => controllers.is_empty(),
            name => controllers.split(',').any(|one| one == name),
        };
        cgroup.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            ours(controllers).then(|| inside(path))
        })
    }

    /// What a group and each above it has left, where it has a limit.
    fn rooms(&self, group: &Path) -> Vec<Room> {
        let mut dir = self.root.join(group);
        let mut rooms = Vec::new();
        loop {
            if let Some(bytes) = self.files.left(&dir) {
                let name = dir.strip_prefix(&self.root).unwrap_or(&dir).display();
                rooms.push(Room { bytes, bound_by: format!("the control group /{name}") });
            }
            if dir == self.root || !dir.pop() {
                return rooms;
            }
        }
    }
}

struct Files {
    /// As `/proc/PID/cgroup` names it.
    controller: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// Of `memory.stat`: the page cache that is given up first.
    reclaimable: &'static str,
}

const VERSION_1: Files = Files {
    controller: "memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file ",
};
const VERSION_2: Files = Files {
    controller: "",
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: "inactive_file ",
};

impl Files {
    /// None: there is no limit, or no such group yet.
    fn left(&self, dir: &Path) -> Option<u64> {
        let read = |name: &str| fs::read_to_string(dir.join(name)).ok();
        // "max" in version 2 is no number; "none" in version 1 is a huge one.
        let limit: u64 = read(self.limit)?.trim().parse().ok()?;
        let usage: u64 = read(self.usage)?.trim().parse().ok()?;
        let stat = read("memory.stat").unwrap_or_default();
        let cache = stat.lines().find_map(|line| line.strip_prefix(self.reclaimable));
        let cache: u64 = cache.and_then(|n| n.trim().parse().ok()).unwrap_or(0);
        Some(limit.saturating_sub(usage.saturating_sub(cache)))
    }
}

/// Where the container's group will lie, by either driver: `/parent/name`, or
/// `some-parent.slice:prefix:name` for systemd, whose slices nest by name.
fn parent_of(cgroups_path: &str) -> PathBuf {
    if let Some((slice, _)) = cgroups_path.split_once(':') {
        return slice_path(if slice.is_empty() { "system.slice" } else { slice });
    }
    let mut parent = inside(cgroups_path);
    parent.pop();
    parent
}

/// Below the root of a hierarchy, whatever it says.
fn inside(path: &str) -> PathBuf {
    let normal = |part: &Component| matches!(part, Component::Normal(_));
    Path::new(path).components().filter(normal).collect()
}

/// `a-b.slice` lies in `a.slice`.
fn slice_path(slice: &str) -> PathBuf {
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut path = PathBuf::new();
    if name == "-" || name.contains('/') {
        return path;
    }
    let ends = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    ends.for_each(|end| path.push(format!("{}.slice", &name[..end])));
    path
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn group(root: &Path, path: &str, files: &[(&str, &str)]) {
        let dir = root.join(path);
        fs::create_dir_all(&dir).unwrap();
        files.iter().for_each(|(name, text)| fs::write(dir.join(name), text).unwrap());
    }

    #[test]
    fn every_group_above_counts_and_cache_is_room() {
        let v2 = TempDir::new().unwrap();
        group(v2.path(), "", &[]);
        group(
            v2.path(),
            "pods",
            &[
                ("memory.max", "1000\n"),
                ("memory.current", "400\n"),
                ("memory.stat", "anon 1\ninactive_file 100\n"),
            ],
        );
        group(v2.path(), "pods/pod", &[("memory.max", "max\n"), ("memory.current", "400\n")]);
        // Its own group is none of those above.
        group(v2.path(), "pods/pod/c", &[("memory.max", "1\n"), ("memory.current", "0\n")]);
        let hierarchy = Hierarchy::at(v2.path());
        let found = hierarchy.rooms(&parent_of("/pods/pod/c"));
        assert_eq!(found, [Room { bytes: 700, bound_by: "the control group /pods".into() }]);
        assert_eq!(hierarchy.rooms(&parent_of("/other/c")), []);
    }

    #[test]
    fn version_1_has_a_hierarchy_of_its_own_for_memory() {
        let v1 = TempDir::new().unwrap();
        let files = [
            ("memory.limit_in_bytes", "500\n"),
            ("memory.usage_in_bytes", "900\n"),
            ("memory.stat", "total_inactive_file 100\n"),
        ];
        group(v1.path(), "memory", &files);
        let found = Hierarchy::at(v1.path()).rooms(&parent_of("/default/c"));
        assert_eq!(found, [Room { bytes: 0, bound_by: "the control group /".into() }]);
    }

    #[test]
    fn both_drivers_name_a_parent() {
        for (path, parent) in [
            ("/default/c", "default"),
            ("c", ""),
            ("", ""),
            ("/../../etc/c", "etc"),
            ("system.slice:docker:c", "system.slice"),
            (":docker:c", "system.slice"),
            (
                "kubepods-besteffort-pod1.slice:cri-containerd:c",
                "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice",
            ),
            ("-.slice:x:c", ""),
        ] {
            assert_eq!(parent_of(path), Path::new(parent), "{path}");
        }
    }

    #[test]
    fn a_process_is_in_the_group_of_its_hierarchy() {
        let (v1, v2) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        group(v1.path(), "memory", &[]);
        let hybrid = "4:cpu,cpuacct:/a\n3:memory:/b/c\n1:name=systemd:/d\n0::/e\n";
        let group = |at: &TempDir, text| Hierarchy::at(at.path()).group_in(text);
        assert_eq!(group(&v1, hybrid), Some("b/c".into()));
        assert_eq!(group(&v2, hybrid), Some("e".into()));
        assert_eq!(group(&v2, "0::/\n"), Some(PathBuf::new()));
        assert_eq!(group(&v1, "0::/e\n"), None);
    }

    #[test]
    fn what_is_free_is_told_by_the_kernel() {
        let free = |text| machine(text).map(|room| room.bytes).ok();
        assert_eq!(free("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(free("MemTotal: 9 kB\n"), None);
        assert_eq!(free("MemAvailable: lots\n"), None);
    }

    #[test]
    fn this_machine_has_room() {
        assert!(for_container("/default/c").unwrap().bytes > 0);
        assert!(for_us().unwrap().bytes > 0);
    }
}
