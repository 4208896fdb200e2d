//! A container's control groups: where they are, who is in them, freezing.
//!
//! libcgroups knows the layout of the host and reads and writes its files.
//! The paths are taken from the process itself and not from the spec: that
//! is right for every driver (cgroupfs, systemd), every nesting and a
//! container that was restored into a group of another name.

mod metrics_v1;
mod metrics_v2;
pub mod oom;
#[cfg(test)]
pub mod scratch;
pub mod throttle;

use std::{
    collections::BTreeMap,
    fs,
    path::{Component, Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use containerd_shim_protos::protobuf::{Message, well_known_types::any::Any};
use libcgroups::common::{read_cgroup_file, write_cgroup_file_str};
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    mounts::unescaped,
};

/// A process in an uninterruptible sleep delays a freeze; one that is stuck
/// there fails it.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
const FREEZE_POLL: Duration = Duration::from_millis(1);
const KILL_POLL: Duration = Duration::from_millis(5);

/// Where a container's groups lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cgroup {
    /// Legacy and hybrid hosts: a directory per controller.
    V1(BTreeMap<String, PathBuf>),
    /// The one directory of a unified host.
    V2(PathBuf),
}

impl Cgroup {
    /// The groups that `pid` is in.
    pub fn of_process(pid: i32) -> Result<Self> {
        Self::of_process_among(pid, &mounts()?)
    }

    /// The same by the mounts of an earlier moment: a CRIU that restores has
    /// mounted all hierarchies once more, for as long as that takes.
    pub fn of_process_among(pid: i32, mounts: &str) -> Result<Self> {
        let path = format!("/proc/{pid}/cgroup");
        let groups = fs::read_to_string(&path).map_err(Error::io(format!("read {path}")))?;
        Self::find(&groups, mounts)
            .ok_or_else(|| Error::Internal(format!("no cgroup of process {pid} is mounted here")))
    }

    /// Hosts with v1 controllers are v1 hosts, also where a unified hierarchy
    /// is mounted beside them.
    fn find(groups: &str, mounts: &str) -> Option<Self> {
        let mounts: Vec<Mounted> = mounts.lines().filter_map(Mounted::parse).collect();
        let mut v1 = BTreeMap::new();
        let mut v2 = None;
        for line in groups.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            if controllers.is_empty() {
                v2 = mounts.iter().rev().filter(|m| m.unified).find_map(|m| m.directory(path));
                continue;
            }
            for controller in controllers.split(',') {
                // The last one first: it may cover others, of another cgroup
                // namespace, in which `path` does not lie.
                let mut mounted = mounts.iter().rev().filter(|m| !m.unified && m.has(controller));
                if let Some(directory) = mounted.find_map(|m| m.directory(path)) {
                    let name = controller.strip_prefix("name=").unwrap_or(controller);
                    v1.insert(name.to_owned(), directory);
                }
            }
        }
        match (v1.contains_key("memory") || v1.contains_key("freezer"), v2) {
            (true, _) => Some(Cgroup::V1(v1)),
            (false, Some(v2)) => Some(Cgroup::V2(v2)),
            (false, None) => None,
        }
    }

    /// The directory of a controller; on v2 there is one for all.
    pub fn directory(&self, controller: &str) -> Option<&Path> {
        match self {
            Cgroup::V1(directories) => directories.get(controller).map(PathBuf::as_path),
            Cgroup::V2(directory) => Some(directory),
        }
    }

    fn required(&self, controller: &str) -> Result<&Path> {
        self.directory(controller).ok_or_else(|| {
            Error::FailedPrecondition(format!("the cgroup controller {controller} is not mounted"))
        })
    }

    /// All processes in the group and below it.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let directory = match self {
            Cgroup::V1(directories) => ["pids", "freezer", "memory", "devices"]
                .into_iter()
                .find_map(|controller| directories.get(controller))
                .ok_or_else(|| Error::Internal("no controller lists processes".into()))?,
            Cgroup::V2(directory) => directory,
        };
        let pids = libcgroups::common::get_all_pids(directory)
            .map_err(Error::other(format!("list the processes in {}", directory.display())))?;
        Ok(pids.into_iter().filter_map(|pid| u32::try_from(pid.as_raw()).ok()).collect())
    }

    /// Whether the group is still there; the runtime removes an empty one.
    pub fn exists(&self) -> bool {
        self.directory("freezer").is_some_and(Path::exists)
    }

    /// Bytes charged to the group now.
    pub fn memory_bytes(&self) -> Result<u64> {
        let file = match self {
            Cgroup::V1(_) => "memory.usage_in_bytes",
            Cgroup::V2(_) => "memory.current",
        };
        let path = self.required("memory")?.join(file);
        libcgroups::stats::parse_single_value(&path)
            .map_err(Error::other(format!("read {}", path.display())))
    }

    /// Bytes of its processes' own memory and of what they share: what is
    /// charged to the group without the page cache.
    pub fn process_bytes(&self) -> Result<u64> {
        let path = self.required("memory")?.join("memory.stat");
        let text = read(&path)?;
        let numbers = flat(&text);
        let (names, swap) = match self {
            // `shmem` is part of what v1 counts as cache.
            Cgroup::V1(_) => (["total_rss", "total_shmem", "total_swap"].as_slice(), 0),
            Cgroup::V2(directory) => {
                (["anon", "shmem"].as_slice(), number(Some(directory), "memory.swap.current"))
            }
        };
        Ok(names.iter().filter_map(|name| numbers.get(name)).sum::<u64>() + swap)
    }

    /// Makes `pid` a member, as far as memory goes: what it uses from now on
    /// is charged to the group.
    pub fn take_memory_of(&self, pid: i32) -> Result<()> {
        let path = self.required("memory")?.join("cgroup.procs");
        write_cgroup_file_str(&path, &pid.to_string())
            .map_err(Error::other(format!("write {}", path.display())))
    }

    /// Stops every process of the group; returns once all stand still.
    /// Blocks for some milliseconds: not for the runtime's own thread.
    pub fn freeze(&self) -> Result<()> {
        self.set_frozen(true)
    }

    /// Lets them run again.
    pub fn thaw(&self) -> Result<()> {
        self.set_frozen(false)
    }

    /// Ends every process of the group, frozen or not, without one of them
    /// running another instruction; returns once none is left. Blocks.
    pub fn kill(&self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let pids = match self.pids() {
                Ok(pids) => pids,
                // Everybody has gone, and so has the group.
                Err(_) if !self.exists() => return Ok(()),
                Err(error) => return Err(error),
            };
            for pid in &pids {
                // Gone already is what we want.
                let _ = signal::kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
            }
            // Frozen processes of a v1 hierarchy die only once thawed; the
            // signal is there first, so none of them runs an instruction.
            let thawed = if self.is_thawed() { Ok(()) } else { self.thaw() };
            if let Err(error) = thawed
                && self.exists()
            {
                return Err(error);
            }
            if pids.is_empty() {
                return Ok(());
            }
            if start.elapsed() > limit {
                return Err(Error::Internal(format!(
                    "{} killed processes did not end within {} s",
                    pids.len(),
                    limit.as_secs()
                )));
            }
            thread::sleep(KILL_POLL);
        }
    }

    /// On v1 a group that freezes only says FREEZING as long as one process
    /// does not stop, and a killed one does not.
    fn is_thawed(&self) -> bool {
        match self {
            Cgroup::V1(directories) => directories.get("freezer").is_none_or(|directory| {
                read(&directory.join("freezer.state")).is_ok_and(|state| state.trim() == "THAWED")
            }),
            Cgroup::V2(directory) => {
                read(&directory.join("cgroup.freeze")).is_ok_and(|state| state.trim() == "0")
            }
        }
    }

    /// Whether all processes stand still.
    pub fn is_frozen(&self) -> Result<bool> {
        let directory = self.required("freezer")?;
        Ok(match self {
            Cgroup::V1(_) => read(&directory.join("freezer.state"))?.trim() == "FROZEN",
            Cgroup::V2(_) => {
                flat(&read(&directory.join("cgroup.events"))?).get("frozen") == Some(&1)
            }
        })
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        let directory = self.required("freezer")?;
        let (path, word) = match (self, frozen) {
            (Cgroup::V1(_), true) => (directory.join("freezer.state"), "FROZEN"),
            (Cgroup::V1(_), false) => (directory.join("freezer.state"), "THAWED"),
            (Cgroup::V2(_), true) => (directory.join("cgroup.freeze"), "1"),
            (Cgroup::V2(_), false) => (directory.join("cgroup.freeze"), "0"),
        };
        let start = Instant::now();
        loop {
            // On v1 the request must be repeated: a process that forks while
            // the group freezes can leave it FREEZING for ever.
            write_cgroup_file_str(&path, word)
                .map_err(Error::other(format!("write {word} to {}", path.display())))?;
            if self.is_frozen()? == frozen {
                return Ok(());
            }
            if start.elapsed() > FREEZE_LIMIT {
                let what = if frozen { "freeze" } else { "thaw" };
                return Err(Error::Internal(format!(
                    "{} did not {what} within {} s",
                    directory.display(),
                    FREEZE_LIMIT.as_secs()
                )));
            }
            thread::sleep(FREEZE_POLL);
        }
    }

    /// Metrics of the group, in the type containerd's own shim answers.
    pub fn metrics(&self) -> Result<Any> {
        // The names are written out for the reason given in `events`.
        let (name, bytes) = match self {
            Cgroup::V1(directories) => (
                "io.containerd.cgroups.v1.Metrics",
                metrics_v1::collect(directories).write_to_bytes(),
            ),
            Cgroup::V2(directory) => (
                "io.containerd.cgroups.v2.Metrics",
                metrics_v2::collect(directory).write_to_bytes(),
            ),
        };
        let value = bytes.map_err(Error::other(format!("encode {name}")))?;
        Ok(Any { type_url: name.into(), value, ..Default::default() })
    }
}

/// What is mounted now, see [`Cgroup::of_process_among`].
pub fn mounts() -> Result<String> {
    let path = "/proc/self/mountinfo";
    fs::read_to_string(path).map_err(Error::io(format!("read {path}")))
}

/// Moves a process into the group `path` of every hierarchy that has it, as
/// the option for the shim's own group wants it.
pub fn join(path: &str, pid: u32) -> Result<()> {
    let mounts = mounts()?;
    let mut joined = false;
    let below = path.trim_start_matches('/');
    if Path::new(below).components().any(|part| part == Component::ParentDir) {
        return Err(Error::InvalidArgument(format!("the cgroup {path} leads upwards")));
    }
    for mounted in mounts.lines().filter_map(Mounted::parse) {
        let file = mounted.point.join(below).join("cgroup.procs");
        if file.exists() {
            write_cgroup_file_str(&file, &pid.to_string())
                .map_err(Error::other(format!("write {pid} to {}", file.display())))?;
            joined = true;
        }
    }
    if joined { Ok(()) } else { Err(Error::NotFound(format!("there is no cgroup {path}"))) }
}

/// One mounted hierarchy, from mountinfo(5).
struct Mounted {
    root: String,
    point: PathBuf,
    unified: bool,
    options: String,
}

impl Mounted {
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (unescaped(left.next()?), unescaped(left.next()?));
        let mut right = right.split(' ');
        let unified = match right.next()? {
            "cgroup" => false,
            "cgroup2" => true,
            _ => return None,
        };
        let options = right.nth(1)?.to_owned();
        Some(Self { root, point: point.into(), unified, options })
    }

    fn has(&self, controller: &str) -> bool {
        self.options.split(',').any(|option| option == controller)
    }

    /// Where `path`, seen from the root of the hierarchy, lies in the mount.
    fn directory(&self, path: &str) -> Option<PathBuf> {
        let below = Path::new(path).strip_prefix(&self.root).ok()?;
        let sound = !below.components().any(|part| part == Component::ParentDir);
        sound.then(|| self.point.join(below))
    }
}

fn read(path: &Path) -> Result<String> {
    read_cgroup_file(path).map_err(Error::other(format!("read {}", path.display())))
}

/// `key value` lines.
fn flat(text: &str) -> BTreeMap<&str, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key, value.trim().parse().ok()?)))
        .collect()
}

/// A file with one number; 0 where the controller or the file is missing, as
/// containerd's own shim has it; `max` is the largest.
fn number(directory: Option<&Path>, file: &str) -> u64 {
    directory
        .and_then(|directory| libcgroups::stats::parse_single_value(&directory.join(file)).ok())
        .unwrap_or(0)
}

fn text(directory: Option<&Path>, file: &str) -> String {
    directory.and_then(|directory| read_cgroup_file(directory.join(file)).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{scratch::Scratch, *};

    const V1_MOUNTS: &str = "\
30 20 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 /node /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
";

    #[test]
    fn a_hybrid_host_is_a_v1_host() {
        let groups = "4:memory:/node/default/c\n3:cpu,cpuacct:/default/c\n0::/default/c\n";
        let Some(Cgroup::V1(found)) = Cgroup::find(groups, V1_MOUNTS) else { panic!("v1 wanted") };
        assert_eq!(found["memory"], Path::new("/sys/fs/cgroup/memory/default/c"));
        assert_eq!(found["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct/default/c"));
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn a_mount_that_covers_another_wins() {
        let mounts = "\
40 30 0:28 /.. /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
41 40 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
";
        let Some(Cgroup::V1(found)) = Cgroup::find("4:memory:/default/x\n", mounts) else {
            panic!("v1 wanted")
        };
        assert_eq!(found["memory"], Path::new("/sys/fs/cgroup/memory/default/x"));
    }

    #[test]
    fn a_unified_host_has_one_directory() {
        let mounts = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let found = Cgroup::find("0::/system.slice/c.scope\n", mounts).unwrap();
        assert_eq!(found, Cgroup::V2("/sys/fs/cgroup/system.slice/c.scope".into()));
        // Seen from a foreign cgroup namespace there is no path to it.
        assert_eq!(Cgroup::find("0::/../other\n", mounts), None);
    }

    #[test]
    fn a_frozen_group_can_be_killed() {
        let Some(mut group) = Scratch::create("kill", &["freezer", "pids"], "exec sleep 600")
        else {
            return;
        };
        group.cgroup.freeze().unwrap();
        let killed = group.cgroup.kill(Duration::from_secs(10));
        assert_eq!(group.child.wait().unwrap().to_string(), "signal: 9 (SIGKILL)");
        killed.unwrap();
        let gone = group.cgroup.clone();
        drop(group);
        assert!(gone.kill(Duration::ZERO).is_ok(), "a group that is gone has nobody");
    }

    #[test]
    fn files_that_are_missing_count_as_zero() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("pids.max"), "max\n").unwrap();
        assert_eq!(number(Some(dir.path()), "pids.max"), u64::MAX);
        assert_eq!(number(Some(dir.path()), "pids.current"), 0);
        assert_eq!(number(None, "pids.current"), 0);
        assert_eq!(flat("anon 12\nfile x\nslab 3\n"), BTreeMap::from([("anon", 12), ("slab", 3)]));
    }
}
