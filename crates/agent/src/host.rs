//! What this machine is: the facts that decide whether processes of one host
//! can run on another.

use std::{fs, path::Path};

use nix::{
    sys::{statfs, utsname},
    unistd::{SysconfVar, sysconf},
};
use transship_api::session::Host;
use transship_criu::features;

use crate::failure::chain;

/// The host as it describes itself to a peer. A CRIU that is missing or does
/// not start has version 0 and its error for a name: the peer, who judges,
/// repeats it.
pub async fn describe() -> Host {
    let (criu, criu_version) = match features::probe().await {
        Ok(found) => (found.version.to_string(), found.version.number()),
        Err(error) => (chain(&error), 0),
    };
    let uname = utsname::uname().ok();
    let text = |s: Option<&std::ffi::OsStr>| s.unwrap_or_default().to_string_lossy().into_owned();
    Host {
        kernel: text(uname.as_ref().map(|u| u.release())),
        architecture: text(uname.as_ref().map(|u| u.machine())),
        cpu_flags: cpu_flags(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        criu,
        criu_version,
        page_size: page_size(),
        cgroup_version: cgroup_version(),
    }
}

/// Whether this process may open a userfaultfd, as shims do to notice writes:
/// the agent's unit takes that away from it.
pub fn may_watch() -> bool {
    const SYS_PTRACE: u32 = 19;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> SYS_PTRACE & 1 == 1)
}

/// Flags of the first processor; all processors of a host have the same ones.
/// x86 calls them "flags", arm64 "Features".
fn cpu_flags(cpuinfo: &str) -> Vec<String> {
    let flags = cpuinfo.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        ["flags", "Features"].contains(&name.trim()).then_some(value)
    });
    flags.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

fn page_size() -> u64 {
    sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|n| n.try_into().ok()).unwrap_or(0)
}

/// 2 where the root of the hierarchy is cgroup2 itself; a hybrid host counts
/// as 1, since its controllers are those of version 1.
fn cgroup_version() -> u32 {
    match statfs::statfs(Path::new("/sys/fs/cgroup")) {
        Ok(fs) if fs.filesystem_type() == statfs::CGROUP2_SUPER_MAGIC => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_on_both_architectures() {
        let x86 = "processor\t: 0\nflags\t\t: fpu sse avx\nbugs\t\t: spectre\nflags\t\t: none\n";
        assert_eq!(cpu_flags(x86), ["fpu", "sse", "avx"]);
        assert_eq!(cpu_flags("processor\t: 0\nFeatures\t: fp asimd\n"), ["fp", "asimd"]);
        assert!(cpu_flags("").is_empty());
    }

    #[tokio::test]
    async fn this_machine_can_be_described() {
        let host = describe().await;
        assert!(!host.kernel.is_empty() && !host.architecture.is_empty());
        assert!(host.page_size >= 4096 && [1, 2].contains(&host.cgroup_version));
    }
}
