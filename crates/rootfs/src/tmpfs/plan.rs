//! Which mounts are the container's own tmpfs.

use std::{
    collections::HashSet,
    fmt,
    path::{Path, PathBuf},
};

use super::{Options, UnknownOption};
use crate::mounts::Mount;

/// Beyond it CRIU gets them. A container has five, and each of them one more
/// for what its spec asks for.
const MOST: usize = 64;

/// A mount that travels beside CRIU's images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmpfs {
    pub(super) id: u64,
    device: String,
    flags: Vec<u8>,
    point: String,
    /// What the mount table calls its device; a name without meaning.
    pub source: String,
    pub options: Options,
}

impl Tmpfs {
    /// In the container.
    pub fn point(&self) -> &str {
        &self.point
    }

    /// Whether by the container's mount table something else is there by now.
    /// Nothing at all is no such thing: it was unmounted, and nobody asks for
    /// it any more.
    pub fn is_replaced(&self, table: &[u8]) -> bool {
        let there: Vec<_> =
            Mount::all(table).filter(|mount| mount.point == Path::new(&self.point)).collect();
        match there.as_slice() {
            [] => false,
            [mount] => checked(mount).as_ref() != Ok(self),
            _ => true,
        }
    }
}

/// Every tmpfs of a container is in one of the two.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub ours: Vec<Tmpfs>,
    pub left: Vec<Left>,
}

/// A tmpfs that is left to CRIU.
#[derive(Debug, PartialEq, Eq)]
pub struct Left {
    pub point: PathBuf,
    pub why: Why,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Why {
    Option(UnknownOption),
    /// Only a part of it is mounted there.
    Part,
    /// It passes mounts on, or takes them over.
    Propagates,
    /// There is more than one mount on that directory, or of that file system.
    Twice,
    /// Its path has what CRIU's list of mounts cannot have.
    Name,
    TooMany,
    /// It could not be opened, or something else is there.
    Hidden(String),
    /// Made by the container's own user namespace, which has a say in it.
    Users,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Option(unknown) => unknown.fmt(f),
            Self::Part => f.write_str("only a part of it is mounted there"),
            Self::Propagates => f.write_str("it shares mounts"),
            Self::Twice => f.write_str("it is mounted more than once"),
            Self::Name => f.write_str("CRIU's list of mounts cannot have this path"),
            Self::TooMany => write!(f, "there are more than {MOST}"),
            Self::Hidden(how) => write!(f, "it cannot be reached: {how}"),
            Self::Users => f.write_str("it belongs to a user namespace"),
        }
    }
}

/// Sorts the tmpfs mounts of `table`, a container's mountinfo. `external`:
/// mount points that CRIU leaves to the OCI runtime already.
pub fn plan(table: &[u8], external: &HashSet<String>) -> Plan {
    let is_external =
        |mount: &Mount<'_>| mount.point.to_str().is_some_and(|point| external.contains(point));
    let mounts: Vec<_> = Mount::all(table).filter(|mount| !is_external(mount)).collect();
    let mut plan = Plan::default();
    for mount in mounts.iter().filter(|mount| mount.kind == b"tmpfs") {
        // The container's root is never CRIU's.
        if mount.point == Path::new("/") {
            continue;
        }
        let again = |other: &&Mount<'_>| {
            let same = other.device == mount.device && other.root == mount.root;
            other.id != mount.id && (same || other.point == mount.point)
        };
        let sorted = match mounts.iter().find(again) {
            Some(_) => Err(Why::Twice),
            None if plan.ours.len() == MOST => Err(Why::TooMany),
            None => checked(mount),
        };
        match sorted {
            Ok(tmpfs) => plan.ours.push(tmpfs),
            Err(why) => plan.left.push(Left { point: mount.point.clone(), why }),
        }
    }
    plan
}

/// By itself, whatever else is mounted.
fn checked(mount: &Mount<'_>) -> Result<Tmpfs, Why> {
    if mount.root != Path::new("/") {
        return Err(Why::Part);
    }
    if mount.propagates {
        return Err(Why::Propagates);
    }
    let point = mount.point.to_str().filter(|point| {
        !point.bytes().any(|byte| byte.is_ascii_control() || b"[]:".contains(&byte))
    });
    let source = mount.source.to_str().filter(|source| !source.bytes().any(|byte| byte == 0));
    let (Some(point), Some(source)) = (point, source) else { return Err(Why::Name) };
    let options = String::from_utf8_lossy(mount.options).parse().map_err(Why::Option)?;
    Ok(Tmpfs {
        id: mount.id,
        device: String::from_utf8_lossy(mount.device).into_owned(),
        flags: mount.flags.to_owned(),
        point: point.to_owned(),
        source: source.to_owned(),
        options,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As runc sets one up on a host with cgroup v1, and some more.
    const TABLE: &str = "\
87 64 254:0 / / rw,relatime - ext4 /dev/vda rw
88 87 0:41 / /proc rw,relatime - proc proc rw
89 87 0:42 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755
90 89 0:43 / /dev/pts rw,nosuid,noexec,relatime - devpts devpts rw,gid=5,mode=620,ptmxmode=666
91 89 0:44 / /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs shm rw,size=65536k
94 93 0:46 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw,mode=755
69 88 0:49 / /proc/acpi ro,relatime - tmpfs tmpfs ro
70 88 0:42 /null /proc/keys rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755
72 87 0:50 / /etc/hosts rw - tmpfs tmpfs rw
73 87 0:51 / /shared rw shared:7 - tmpfs tmpfs rw
74 87 0:52 / /odd rw - tmpfs tmpfs rw,sync
75 87 0:53 /sub /part rw - tmpfs tmpfs rw
76 87 0:54 / /a[b] rw - tmpfs tmpfs rw
77 87 0:55 / /twice rw - tmpfs tmpfs rw
78 77 0:56 / /twice rw - tmpfs tmpfs rw
79 87 0:57 / /one rw - tmpfs tmpfs rw
80 87 0:57 / /other rw - tmpfs tmpfs rw
";

    fn external() -> HashSet<String> {
        ["/proc/keys", "/etc/hosts"].map(str::to_owned).into()
    }

    #[test]
    fn a_tmpfs_is_ours_or_it_is_said_why_not() {
        let plan = plan(TABLE.as_bytes(), &external());
        let ours: Vec<_> = plan
            .ours
            .iter()
            .map(|tmpfs| (tmpfs.point(), tmpfs.source.as_str(), tmpfs.options.to_string()))
            .collect();
        assert_eq!(
            ours,
            [
                ("/dev", "tmpfs", "rw,size=65536k,mode=755".to_owned()),
                ("/dev/shm", "shm", "rw,size=65536k".to_owned()),
                ("/sys/fs/cgroup", "tmpfs", "rw,mode=755".to_owned()),
                ("/proc/acpi", "tmpfs", "ro".to_owned()),
            ]
        );
        let left: Vec<_> =
            plan.left.iter().map(|left| (left.point.to_str().unwrap(), &left.why)).collect();
        assert_eq!(
            left,
            [
                ("/shared", &Why::Propagates),
                ("/odd", &Why::Option(UnknownOption("sync".into()))),
                ("/part", &Why::Part),
                ("/a[b]", &Why::Name),
                ("/twice", &Why::Twice),
                ("/twice", &Why::Twice),
                ("/one", &Why::Twice),
                ("/other", &Why::Twice),
            ]
        );
    }

    #[test]
    fn a_root_in_memory_and_other_file_systems_are_nothing_to_plan() {
        let table = "1 0 0:1 / / rw - tmpfs tmpfs rw\n2 1 0:5 / /dev rw - devtmpfs dev rw\nx\n";
        assert_eq!(plan(table.as_bytes(), &HashSet::new()), Plan::default());
    }

    #[test]
    fn there_is_a_limit() {
        let line = |n| format!("{n} 1 0:{n} / /m{n} rw - tmpfs tmpfs rw\n");
        let table: String = (100..=100 + MOST).map(line).collect();
        let plan = plan(table.as_bytes(), &HashSet::new());
        assert_eq!(plan.ours.len(), MOST);
        assert_eq!(plan.left, [Left { point: "/m164".into(), why: Why::TooMany }]);
    }

    #[test]
    fn what_has_come_in_its_place_is_noticed() {
        let shm = plan(TABLE.as_bytes(), &external()).ours.remove(1);
        assert!(!shm.is_replaced(TABLE.as_bytes()));
        let line =
            "91 89 0:44 / /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs shm rw,size=65536k\n";
        assert!(!shm.is_replaced(TABLE.replace(line, "").as_bytes()), "it is gone");
        for (from, to) in [
            ("91 89", "191 89"),
            ("0:44", "0:144"),
            ("size=65536k\n94", "size=1k\n94"),
            ("noexec,relatime - tmpfs shm", "relatime - tmpfs shm"),
            (line, "91 89 0:44 / /dev/shm rw - ext4 /dev/vdb rw\n"),
            (line, &format!("{line}191 91 0:144 / /dev/shm rw - tmpfs tmpfs rw\n")),
        ] {
            let table = TABLE.replacen(from, to, 1);
            assert_ne!(table, TABLE);
            assert!(shm.is_replaced(table.as_bytes()), "{to}");
        }
    }
}
