//! What a process has that CRIU cannot dump, so that it is said before
//! anything moves.

use std::fs;

/// Kinds of descriptors, by what their links in /proc/PID/fd read.
const KINDS: [(&str, &str); 2] =
    [("anon_inode:[userfaultfd]", "a userfaultfd"), ("anon_inode:[io_uring]", "an io_uring")];

/// A sentence for each obstacle; none of a process that has ended.
pub fn obstacles(pid: i32) -> Vec<String> {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let links: Vec<_> =
        descriptors.flatten().filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    KINDS
        .iter()
        .filter(|(link, _)| links.iter().any(|found| found.as_os_str() == *link))
        .map(|(_, kind)| format!("process {pid} has {kind}, which CRIU cannot dump"))
        .collect()
}
