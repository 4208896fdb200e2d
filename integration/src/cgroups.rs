//! The cgroups of a node: one child in every hierarchy of the host, whether
//! v1, hybrid or v2. The node's cgroup namespace is rooted there, so equal
//! container ids on two nodes do not meet.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::eventually;

/// In v2 a cgroup with controllers handed to its children holds no process
/// itself (cgroups(7), "no internal processes"): a node's own go in here.
const LEAF: &str = "node";

/// Handed to the children of a v2 node, as far as the host has them: what
/// containers need for limits and statistics.
const CONTROLLERS: [&str; 6] = ["cpuset", "cpu", "io", "memory", "hugetlb", "pids"];

/// One mounted cgroup hierarchy of the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hierarchy {
    pub mount: PathBuf,
    /// Mount options that select it again; empty for v2.
    pub options: String,
    pub unified: bool,
    /// Where this process is in it, below `mount`.
    own: PathBuf,
}

impl Hierarchy {
    /// All that are mounted, in the order of their mounting.
    pub fn all() -> Result<Vec<Self>> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("mountinfo")?;
        let own = fs::read_to_string("/proc/self/cgroup").context("own cgroups")?;
        let found: Vec<_> = mounts.lines().filter_map(|line| Self::parse(line, &own)).collect();
        if found.is_empty() {
            bail!("no cgroup hierarchy is mounted on this machine");
        }
        Ok(found)
    }

    fn parse(mountinfo: &str, own: &str) -> Option<Self> {
        let (before, after) = mountinfo.split_once(" - ")?;
        let fields: Vec<_> = before.split(' ').collect();
        let (root, mount) = (fields.get(3)?, fields.get(4)?);
        let mut after = after.split(' ');
        let unified = match after.next()? {
            "cgroup" => false,
            "cgroup2" => true,
            _ => return None,
        };
        let selecting: Vec<_> = after
            .nth(1)?
            .split(',')
            .filter(|option| !unified && !["rw", "ro", "xattr", "clone_children"].contains(option))
            .filter(|option| !option.starts_with("release_agent="))
            .collect();
        let path = own.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?);
            let same = if unified {
                controllers.is_empty()
            } else {
                controllers.split(',').any(|one| selecting.contains(&one))
            };
            same.then_some(path)
        })?;
        let own = Path::new(path).strip_prefix(root).unwrap_or(Path::new("")).to_owned();
        let own = own.strip_prefix("/").unwrap_or(&own).to_owned();
        let mut options = selecting.join(",");
        if options.starts_with("name=") {
            options = format!("none,{options}");
        }
        Some(Self { mount: PathBuf::from(mount), options, unified, own })
    }

    /// The node's root. In v1 below this process, whose limits go on holding;
    /// in v2 that is not allowed (see [`LEAF`]), so below the root.
    pub fn of_node(&self, node: &str) -> PathBuf {
        let base = if self.unified { self.mount.clone() } else { self.mount.join(&self.own) };
        base.join(format!("transship-{node}"))
    }
}

/// The node's cgroup in every hierarchy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeCgroups {
    node: String,
    hierarchies: Vec<Hierarchy>,
}

impl NodeCgroups {
    pub fn of(node: &str) -> Result<Self> {
        Ok(Self { node: node.to_owned(), hierarchies: Hierarchy::all()? })
    }

    pub fn hierarchies(&self) -> &[Hierarchy] {
        &self.hierarchies
    }

    /// The node's root in every hierarchy, as the host sees it.
    pub fn roots(&self) -> impl Iterator<Item = (&Hierarchy, PathBuf)> {
        self.hierarchies.iter().map(|one| (one, one.of_node(&self.node)))
    }

    pub fn create(&self) -> Result<()> {
        for (hierarchy, root) in self.roots() {
            if hierarchy.unified {
                hand_down(&hierarchy.mount);
            }
            fs::create_dir(&root).with_context(|| format!("create {}", root.display()))?;
            if root.join("cpuset.cpus").exists() && !hierarchy.unified {
                inherit_cpuset(&root)?;
            }
        }
        Ok(())
    }

    /// Makes the roots this process's own cgroups: a cgroup namespace is
    /// rooted where its maker is at that moment.
    pub fn enter_roots(&self) -> Result<()> {
        self.roots().try_for_each(|(_, root)| join(&root))
    }

    /// After the namespace was made: leaves a v2 root to the containers.
    pub fn settle(&self) -> Result<()> {
        for (_, root) in self.roots().filter(|(hierarchy, _)| hierarchy.unified) {
            let leaf = root.join(LEAF);
            fs::create_dir(&leaf).with_context(|| format!("create {}", leaf.display()))?;
            join(&leaf)?;
            hand_down(&root);
        }
        Ok(())
    }

    /// Where processes of the node live, once it stands.
    pub fn enter(&self) -> Result<()> {
        self.roots().try_for_each(|(hierarchy, root)| {
            if hierarchy.unified { join(&root.join(LEAF)) } else { join(&root) }
        })
    }

    /// Removes them with everything below, once their processes are gone.
    pub fn remove(&self) -> Result<()> {
        self.roots().try_for_each(|(_, root)| {
            eventually(
                &format!("{} to be empty", root.display()),
                || Ok(remove_tree(&root).is_ok()),
            )
        })
    }
}

fn join(cgroup: &Path) -> Result<()> {
    let procs = cgroup.join("cgroup.procs");
    fs::write(&procs, process::id().to_string())
        .with_context(|| format!("join {}", procs.display()))
}

/// Lets children use the controllers. One that the host keeps to itself is
/// left out: what needs it then says so by name.
fn hand_down(cgroup: &Path) {
    let offered = fs::read_to_string(cgroup.join("cgroup.controllers")).unwrap_or_default();
    for controller in CONTROLLERS {
        if offered.split_whitespace().any(|one| one == controller) {
            let _ = fs::write(cgroup.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

/// A new v1 cpuset is empty and takes no process.
fn inherit_cpuset(cgroup: &Path) -> Result<()> {
    let parent = cgroup.parent().context("a cgroup without parent")?;
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let value = fs::read_to_string(parent.join(file))?;
        fs::write(cgroup.join(file), value.trim())
            .with_context(|| format!("{file} of {}", cgroup.display()))?;
    }
    Ok(())
}

fn remove_tree(cgroup: &Path) -> io::Result<()> {
    for below in below(cgroup)?.iter().rev() {
        fs::remove_dir(below)?;
    }
    match fs::remove_dir(cgroup) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Every cgroup below this one, parents first.
pub fn below(cgroup: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(cgroup) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
            found.extend(below(&entry.path())?);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str =
        "4:memory:/sandbox/x\n3:cpuset:/\n9:name=systemd:/\n2:cpu,cpuacct:/\n0::/user.slice\n";

    #[test]
    fn hierarchies_are_read_from_mountinfo() {
        let line = |mount: &str, kind: &str, options: &str| {
            Hierarchy::parse(
                &format!("35 31 0:31 / {mount} rw,relatime - {kind} cgroup {options}"),
                OWN,
            )
        };
        let memory = line("/sys/fs/cgroup/memory", "cgroup", "rw,memory").unwrap();
        assert_eq!(memory.options, "memory");
        assert_eq!(memory.of_node("a"), Path::new("/sys/fs/cgroup/memory/sandbox/x/transship-a"));
        let named =
            line("/sys/fs/cgroup/systemd", "cgroup", "rw,xattr,release_agent=/x,name=systemd")
                .unwrap();
        assert_eq!(named.options, "none,name=systemd");
        let both = line("/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct").unwrap();
        assert_eq!(both.options, "cpu,cpuacct");
        let unified = line("/sys/fs/cgroup", "cgroup2", "rw,nsdelegate").unwrap();
        assert!(unified.unified && unified.options.is_empty());
        assert_eq!(unified.of_node("a"), Path::new("/sys/fs/cgroup/transship-a"));
        assert!(line("/proc", "proc", "rw").is_none());
    }
}
