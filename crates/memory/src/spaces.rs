//! Whose memory there is: one process for each address space.
//!
//! Threads belong to their process, and of processes that share their memory
//! (vfork(2), CLONE_VM) the oldest stands for all. A process is the same as
//! long as its handle (pidfd) says so: numbers are used again.

use std::{cmp::Ordering, collections::BTreeMap, fs, io, os::fd::OwnedFd, sync::Arc};

use transship_types::Space;

use crate::{MemoryError, maps::gone, sys};

/// A process, held on to by a descriptor.
#[derive(Debug)]
pub(crate) struct Process {
    pub pid: i32,
    pub space: Space,
    pub handle: OwnedFd,
    /// In clock ticks since boot; never the same for two processes of one pid.
    started: u64,
}

impl Process {
    /// None if it is gone, or a zombie: that has no memory.
    pub fn open(pid: i32) -> io::Result<Option<Self>> {
        let opened = (|| {
            let handle = sys::process::open(pid)?;
            let Some(started) = start_of(&fs::read_to_string(format!("/proc/{pid}/stat"))?) else {
                return Ok(None);
            };
            let space = space_of(&fs::read_to_string(format!("/proc/{pid}/status"))?)?;
            Ok(Some(Self { pid, space, handle, started }))
        })();
        match opened {
            Err(error) if gone(&error) => Ok(None),
            other => other,
        }
    }
}

/// The processes that stand for the address spaces of `pids`. Those of
/// `known` that are still there are the same objects.
pub(crate) fn survey(
    pids: &[i32],
    known: &BTreeMap<Space, Arc<Process>>,
) -> Result<BTreeMap<Space, Arc<Process>>, MemoryError> {
    let known: BTreeMap<i32, &Arc<Process>> = known.values().map(|p| (p.pid, p)).collect();
    let mut processes = Vec::with_capacity(pids.len());
    for &pid in pids {
        let process = Process::open(pid).map_err(|source| MemoryError::Process {
            what: "looking at",
            pid,
            source,
        })?;
        let Some(process) = process else { continue };
        processes.push(match known.get(&pid) {
            Some(same) if same.started == process.started => Arc::clone(same),
            _ => Arc::new(process),
        });
    }
    let mut spaces = BTreeMap::new();
    for process in one_for_each_space(processes) {
        if let Some(other) = spaces.insert(process.space, process) {
            let (space, pid) = (other.space, other.pid);
            return Err(MemoryError::Invalid(format!(
                "{space} is two processes, one of them {pid} on the host: \
                 a process id namespace lies within the container's",
            )));
        }
    }
    Ok(spaces)
}

fn one_for_each_space(mut processes: Vec<Arc<Process>>) -> Vec<Arc<Process>> {
    // A kernel that does not compare (no CONFIG_KCMP), and a process that has
    // just ended, have every process differ: its memory is then told twice,
    // which is slow and not wrong.
    let compare = |a: &Arc<Process>, b: &Arc<Process>| {
        sys::process::compare_spaces(a.pid, b.pid).unwrap_or_else(|_| a.pid.cmp(&b.pid))
    };
    // Equal ones lie side by side afterwards, if nothing changed meanwhile.
    // A pair that is missed for that reason is seen in the next round.
    sort(&mut processes, compare);
    processes.dedup_by(|later, kept| {
        let same = compare(later, kept) == Ordering::Equal;
        if same && (later.started, later.pid) < (kept.started, kept.pid) {
            std::mem::swap(later, kept);
        }
        same
    });
    processes
}

/// Sorts by an order that may change under it, which the library's sorts may
/// answer with a panic: merges halves.
fn sort<T: Clone>(items: &mut [T], compare: impl Fn(&T, &T) -> Ordering + Copy) {
    if items.len() < 2 {
        return;
    }
    let middle = items.len() / 2;
    sort(&mut items[..middle], compare);
    sort(&mut items[middle..], compare);
    let halves = items.to_vec();
    let (left, right) = halves.split_at(middle);
    let (mut left, mut right) = (left.iter().peekable(), right.iter().peekable());
    for place in items {
        let from_left = match (left.peek(), right.peek()) {
            (Some(l), Some(r)) => compare(l, r) != Ordering::Greater,
            (l, _) => l.is_some(),
        };
        let next = if from_left { left.next() } else { right.next() };
        place.clone_from(next.expect("as many as there are places"));
    }
}

/// When the process started, from /proc/PID/stat. None: it has ended.
fn start_of(stat: &str) -> Option<u64> {
    // The name, in parentheses, may contain anything.
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_ascii_whitespace();
    let state = fields.next()?;
    // Field 22 of proc_pid_stat(5); the state is the third.
    let started = fields.nth(18)?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(started)
}

/// The process's id in its own pid namespace, from /proc/PID/status.
fn space_of(status: &str) -> io::Result<Space> {
    let id = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))
        .and_then(|ids| ids.split_ascii_whitespace().next_back())
        .and_then(|id| id.parse().ok());
    let id = id.ok_or_else(|| io::Error::other("its status names no id (NSpid)"))?;
    Ok(Space::Process(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_id_names_the_space() {
        let status = "Name:\tx\nNSpid:\t4711\t12\t1\nNSpgid:\t1\n";
        assert_eq!(space_of(status).unwrap(), Space::Process(1));
        assert!(space_of("Name:\tx\n").is_err());
    }

    #[test]
    fn a_name_cannot_fake_the_state() {
        let rest = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(start_of(&format!("7 (a) Z (b) S {rest}")), Some(4242));
        assert_eq!(start_of(&format!("7 (a) Z {rest}")), None);
        assert_eq!(start_of("7 (a"), None);
    }

    #[test]
    fn an_order_that_contradicts_itself_loses_nothing() {
        let mut items: Vec<u32> = (0..100).collect();
        sort(
            &mut items,
            |a, b| if (a * 7 + b * 3) % 5 < 2 { Ordering::Less } else { Ordering::Greater },
        );
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
        sort(&mut items, |a, b| b.cmp(a));
        assert_eq!(items, (0..100).rev().collect::<Vec<_>>());
    }

    #[test]
    fn a_process_stays_the_same_object() {
        let own = std::process::id() as i32;
        let first = survey(&[own, i32::MAX], &BTreeMap::new()).unwrap();
        let second = survey(&[own], &first).unwrap();
        assert_eq!(first.len(), 1);
        let (space, process) = first.first_key_value().unwrap();
        assert!(Arc::ptr_eq(process, &second[space]));
    }
}
