//! How much memory an arriving container may take: what the machine has left,
//! and what the control groups above the container's leave of it.
//!
//! The container's own group does not exist yet; its own limit moves along and
//! was enough where it comes from.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use crate::host;

const HIERARCHY: &str = "/sys/fs/cgroup";

/// Bytes, and whose bound it is: `the machine`, or a control group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Room {
    pub bytes: u64,
    pub bound_by: String,
}

/// `cgroups_path` as the container's spec has it.
pub fn of(cgroups_path: &str) -> io::Result<Room> {
    let machine = Room { bytes: host::memory_available()?, bound_by: "the machine".into() };
    let groups = above(Path::new(HIERARCHY), cgroups_path);
    Ok(groups.into_iter().chain([machine]).min_by_key(|room| room.bytes).unwrap_or_default())
}

/// What each group above the container's has left, where it has a limit.
fn above(hierarchy: &Path, cgroups_path: &str) -> Vec<Room> {
    // A host with version 1 has a directory for each controller.
    let v1 = hierarchy.join("memory");
    let (root, files) =
        if v1.is_dir() { (v1, &VERSION_1) } else { (hierarchy.to_owned(), &VERSION_2) };
    let parent = parent_of(cgroups_path);
    let mut dir = root.join(&parent);
    let mut rooms = Vec::new();
    loop {
        if let Some(bytes) = files.left(&dir) {
            let name = dir.strip_prefix(&root).unwrap_or(&dir).display();
            rooms.push(Room { bytes, bound_by: format!("the control group /{name}") });
        }
        if dir == root || !dir.pop() {
            return rooms;
        }
    }
}

struct Files {
    limit: &'static str,
    usage: &'static str,
    /// Of `memory.stat`: the page cache that is given up first.
    reclaimable: &'static str,
}

const VERSION_1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file ",
};
const VERSION_2: Files =
    Files { limit: "memory.max", usage: "memory.current", reclaimable: "inactive_file " };

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
    let path = Path::new(cgroups_path);
    let inside = |part: &Component| matches!(part, Component::Normal(_));
    let mut parent: PathBuf = path.components().filter(inside).collect();
    parent.pop();
    parent
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
        let found = above(v2.path(), "/pods/pod/c");
        assert_eq!(found, [Room { bytes: 700, bound_by: "the control group /pods".into() }]);
        assert_eq!(above(v2.path(), "/other/c"), []);
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
        let found = above(v1.path(), "/default/c");
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
    fn this_machine_has_room() {
        assert!(of("/default/c").unwrap().bytes > 0);
    }
}
