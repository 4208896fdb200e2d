//! Which processes of a container CRIU can dump: those that descend from its
//! first process. One that was put in from outside (`ctr task exec`,
//! `docker exec`, a probe) has its parent on the host, and CRIU refuses it
//! after everything has been frozen; so we ask before.

use std::{collections::HashMap, fs};

use crate::{cgroup::Cgroup, error::Result};

/// A process of the container that is not in its tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stranger {
    pub pid: u32,
    pub name: String,
}

/// Processes in `cgroup` that do not descend from `init`. Whoever ends while
/// we look is not one.
pub fn strangers(cgroup: &Cgroup, init: u32) -> Result<Vec<Stranger>> {
    let statuses: HashMap<u32, Status> =
        cgroup.pids()?.into_iter().filter_map(|pid| Some((pid, Status::read(pid)?))).collect();
    let parents = statuses.iter().map(|(pid, status)| (*pid, status.parent)).collect();
    let mut found: Vec<Stranger> = outside(&parents, init)
        .into_iter()
        .map(|pid| Stranger { pid, name: statuses[&pid].name.clone() })
        .collect();
    found.sort_by_key(|stranger| stranger.pid);
    Ok(found)
}

/// The pids whose line of parents does not lead to `init`.
fn outside(parents: &HashMap<u32, u32>, init: u32) -> Vec<u32> {
    let descends = |pid: u32| {
        let mut pid = pid;
        // No line of parents is longer than the number of processes.
        for _ in 0..=parents.len() {
            if pid == init {
                return true;
            }
            match parents.get(&pid) {
                Some(parent) => pid = *parent,
                None => return false,
            }
        }
        false
    };
    parents.keys().copied().filter(|pid| !descends(*pid)).collect()
}

/// The id of a process in its own pid namespace; None for one that is gone
/// or a zombie.
pub fn inner_pid(pid: i32) -> Option<u32> {
    Status::read(u32::try_from(pid).ok()?)?.inner
}

struct Status {
    /// In the innermost pid namespace.
    inner: Option<u32>,
    name: String,
    parent: u32,
}

impl Status {
    /// From proc_pid_status(5); None for one that is gone or a zombie.
    fn read(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if field("State:")?.starts_with('Z') {
            return None;
        }
        let inner = field("NSpid:").and_then(|ids| ids.split_ascii_whitespace().next_back());
        Some(Self {
            inner: inner.and_then(|id| id.parse().ok()),
            name: field("Name:")?.into(),
            parent: field("PPid:")?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_that_lead_to_init_are_inside() {
        // 10 is init with a child and a grandchild; 50 came from outside and
        // has a child; 60's parent is the shim.
        let parents = HashMap::from([(10, 1), (11, 10), (12, 11), (50, 2), (51, 50), (60, 1)]);
        let mut found = outside(&parents, 10);
        found.sort_unstable();
        assert_eq!(found, [50, 51, 60]);
    }

    #[test]
    fn our_own_id_is_known() {
        let own = std::process::id();
        let inner = inner_pid(own as i32).unwrap();
        assert!(inner <= own, "{inner}");
        assert_eq!(inner_pid(0), None);
    }

    #[test]
    fn a_loop_of_parents_ends() {
        let parents = HashMap::from([(10, 1), (20, 21), (21, 20)]);
        assert_eq!(outside(&parents, 10).len(), 2);
    }
}
