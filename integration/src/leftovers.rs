//! "Nothing left behind", made checkable: everything a container may leave on
//! a node, as lines that two moments can be compared by.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, FileType},
    io,
    os::unix::fs::FileTypeExt,
    path::Path,
};

use anyhow::{Result, bail};

use crate::{Node, cgroups, until};

/// What is there, and how often.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Things(BTreeMap<String, usize>);

/// Come with first use and stay by design: CRIU's memory of the kernel,
/// folders of containerd and of our shim.
const STAYS: [&str; 8] = [
    "/run/criu.kdat",
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/containerd/runc",
    "/run/transship",
    "/run/transship/console",
    "/run/transship/gate",
    "/run/transship/shim",
];

/// containerd's namespaces: a cgroup, a folder of the OCI runtime and one of
/// containerd's plugins are named after each and stay as well.
const NAMESPACES: [&str; 3] = ["default", "k8s.io", "moby"];

fn stays(path: &str) -> bool {
    let of_plugin = |dir: &str| {
        dir.starts_with("/run/containerd/io.containerd.") && dir.matches('/').count() == 3
    };
    STAYS.contains(&path)
        || of_plugin(path)
        || path.rsplit_once('/').is_some_and(|(dir, name)| {
            NAMESPACES.contains(&name)
                && (dir.is_empty() || dir == "/run/containerd/runc" || of_plugin(dir))
        })
}

impl Node {
    /// Processes, mounts, cgroups, network namespaces, sockets, fifos, files
    /// of state, and containerd's own records.
    pub fn everything(&self) -> Result<Things> {
        let mut things = Things::default();
        self.processes(&mut things)?;
        let root = self.path("/");
        for line in fs::read_to_string(format!("/proc/{}/mountinfo", self.init()))?.lines() {
            things.add(format!("mount {}", line.split(' ').nth(4).unwrap_or(line)));
        }
        for (hierarchy, cgroup) in self.cgroups().roots() {
            for below in cgroups::below(&cgroup)? {
                let inside =
                    format!("/{}", below.strip_prefix(&cgroup).unwrap_or(&below).display());
                if !stays(&inside) {
                    things.add(format!("cgroup {} {inside}", hierarchy.mount.display()));
                }
            }
        }
        for line in fs::read_to_string(format!("/proc/{}/net/unix", self.init()))?.lines() {
            if let Some(name) = line.split_whitespace().nth(7).filter(|name| name.starts_with('@'))
            {
                things.add(format!("abstract socket {name}"));
            }
        }
        for dir in ["run", "var/lib/transship"] {
            files(&root, Path::new(dir), &mut things)?;
        }
        self.records(&mut things)?;
        Ok(things)
    }

    /// Waits until nothing is there that was not there `before`.
    pub fn nothing_left(&self, before: &Things) -> Result<()> {
        let mut left = Vec::new();
        let gone = until("everything to be gone", || {
            left = self.everything()?.beyond(before);
            Ok(left.is_empty().then_some(()))
        });
        if gone.is_err() && !left.is_empty() {
            bail!("left behind on node {}:\n  {}", self.name(), left.join("\n  "));
        }
        gone
    }

    fn processes(&self, things: &mut Things) -> Result<()> {
        let own_network = fs::read_link(format!("/proc/{}/ns/net", self.init()))?;
        for entry in fs::read_dir(self.path("/proc"))? {
            let path = entry?.path();
            let process =
                path.file_name().is_some_and(|name| name.as_encoded_bytes()[0].is_ascii_digit());
            // One that ends meanwhile is not left behind.
            let Some(name) = process.then(|| fs::read_to_string(path.join("comm")).ok()).flatten()
            else {
                continue;
            };
            things.add(format!("process {}", name.trim()));
            let network = fs::read_link(path.join("ns/net"));
            if network.is_ok_and(|network| network != own_network) {
                things.add(format!("network namespace of {}", name.trim()));
            }
        }
        Ok(())
    }

    fn records(&self, things: &mut Things) -> Result<()> {
        if self.containerd.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).is_none() {
            return Ok(());
        }
        for namespace in self.ctr_ok(&["namespace", "ls", "-q"])?.split_whitespace() {
            for (what, list) in [
                ("container", &["container", "ls", "-q"][..]),
                ("task", &["task", "ls", "-q"]),
                ("image", &["image", "ls", "-q"]),
                ("lease", &["leases", "ls", "-q"]),
            ] {
                let mut arguments = vec!["-n", namespace];
                arguments.extend(list);
                for name in self.ctr_ok(&arguments)?.split_whitespace() {
                    things.add(format!("{what} {namespace}/{name}"));
                }
            }
            for line in self.ctr_ok(&["-n", namespace, "snapshot", "ls"])?.lines().skip(1) {
                let key = line.split_whitespace().next().unwrap_or_default();
                things.add(format!("snapshot {namespace}/{key}"));
            }
        }
        Ok(())
    }
}

impl Things {
    fn add(&mut self, thing: String) {
        *self.0.entry(thing).or_default() += 1;
    }

    /// What is here and was not there, as often as it is more.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        let was = |thing: &str| before.0.get(thing).copied().unwrap_or_default();
        let more = self.0.iter().filter(|(thing, count)| **count > was(thing));
        more.map(
            |(thing, count)| {
                if *count == 1 { thing.clone() } else { format!("{thing} ({count} times)") }
            },
        )
        .collect()
    }

    pub fn contains(&self, thing: &str) -> bool {
        self.0.contains_key(thing)
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl fmt::Display for Things {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter().try_for_each(|thing| writeln!(f, "{thing}"))
    }
}

fn files(root: &Path, dir: &Path, things: &mut Things) -> io::Result<()> {
    let entries = match fs::read_dir(root.join(dir)) {
        // Removed while we looked, or never made.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let path = dir.join(entry.file_name());
        let Ok(kind) = entry.file_type() else { continue };
        let shown = format!("/{}", path.display());
        if !stays(&shown) {
            things.add(format!("{} {shown}", kind_name(kind)));
        }
        // A container's root file system shows under its bundle: one line,
        // as a mount, is enough.
        if kind.is_dir() && !path.ends_with("rootfs") {
            files(root, &path, things)?;
        }
    }
    Ok(())
}

fn kind_name(kind: FileType) -> &'static str {
    if kind.is_socket() {
        "socket"
    } else if kind.is_fifo() {
        "fifo"
    } else if kind.is_dir() {
        "folder"
    } else if kind.is_symlink() {
        "link"
    } else {
        "file"
    }
}
