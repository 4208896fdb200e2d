//! Whether a container can come here: every reason against it at once.
//!
//! The facts are gathered by [`gather`]; [`judge`] and what it calls only
//! compare values.

use std::{
    collections::HashSet,
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use transship_api::session::Host;
use transship_criu::features::OLDEST;
use transship_memory::room::{self, Room};
use transship_types::{Code, Refusal};

use crate::{
    config::Limits, containerd::spec::Network, daemon::DaemonError, node::Node, offer::Checked,
};

/// A layer arrives compressed and is then unpacked; a factor of three covers
/// both for all but the emptiest files.
const UNPACKED: u64 = 3;

/// What an arrival takes beside its pages, which are there once: page tables,
/// the index of those that wait, buffers of the lanes, CRIU and its images.
const BESIDE_PAGES: u64 = 32 << 20;
/// The same, for what grows with the memory.
const PART_BESIDE_PAGES: u64 = 32;

/// Made by the daemon for each container, on the target as on the source.
const DAEMONS_OWN: [&str; 6] = [
    "/run/containerd/",
    "/var/run/containerd/",
    "/var/lib/containerd/",
    "/var/lib/kubelet/pods/",
    "/var/lib/nerdctl/",
    "/var/lib/docker/containers/",
];

/// What this node is and has, as far as an offer asks for it.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    pub host: Host,
    /// What bears the name already.
    pub taken: Option<String>,
    pub has_snapshotter: bool,
    pub missing: Vec<String>,
    pub disk_free: u64,
    pub memory: Room,
    /// Absolute sources of bind mounts and namespaces that are not here.
    pub absent_paths: HashSet<String>,
    pub shim: bool,
    pub oci_runtime: bool,
}

pub async fn gather(node: &Node, offer: &Checked) -> Result<Facts, DaemonError> {
    let daemon = &node.daemon;
    let snapshotter = &offer.record.snapshotter;
    let mut facts = Facts {
        host: node.host().await,
        taken: daemon.taken(&offer.key, snapshotter).await?,
        has_snapshotter: daemon.has_snapshotter(snapshotter).await?,
        missing: daemon.missing(offer.key.namespace(), &offer.content).await?,
        disk_free: daemon.free_disk().await?,
        memory: room::for_container(offer.spec.cgroup_path())
            .map_err(|e| DaemonError::failed("to read /proc/meminfo", e))?,
        absent_paths: HashSet::new(),
        shim: has_shim(&offer.record.runtime),
        oci_runtime: offer
            .runtime
            .split_whitespace()
            .next()
            .is_none_or(|n| installed(Path::new(n))),
    };
    let mounts = offer.spec.bind_mounts().into_iter().map(|m| m.source);
    let namespace = match offer.spec.network() {
        Network::At(path) => Some(path),
        Network::Host | Network::New => None,
    };
    facts.absent_paths =
        mounts.chain(namespace).filter(|p| fs::symlink_metadata(p).is_err()).collect();
    Ok(facts)
}

/// Every refusal, most fundamental first.
pub fn judge(offer: &Checked, here: &Facts, limits: &Limits) -> Vec<Refusal> {
    let mut refusals = hosts(&offer.host, &here.host);
    refusals.extend(names(offer, here));
    refusals.extend(programs(offer, here));
    refusals.extend(surroundings(offer, here));
    refusals.extend(room(offer, here, limits));
    refusals
}

/// Whether processes of `source` can go on at `target`. No reason depends on
/// the container, so `check --to` asks the same.
pub fn hosts(source: &Host, target: &Host) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut differ = |what: &str, there: &dyn std::fmt::Display, here: &dyn std::fmt::Display| {
        refusals.push(Refusal::new(
            Code::Host,
            format!("the source has {what} {there}, the target {here}"),
            "move to a node of the same kind",
        ));
    };
    if source.architecture != target.architecture {
        differ("architecture", &source.architecture, &target.architecture);
    } else if source.page_size != target.page_size {
        differ("page size", &source.page_size, &target.page_size);
    }
    if source.cgroup_version != target.cgroup_version {
        differ("cgroup version", &source.cgroup_version, &target.cgroup_version);
    }
    refusals.extend(criu(source, target));
    if source.architecture == target.architecture {
        refusals.extend(cpu(source, target));
    }
    refusals
}

/// Images of a newer minor version cannot be read by an older one.
fn criu(source: &Host, target: &Host) -> Option<Refusal> {
    let minor = |host: &Host| host.criu_version / 100;
    let install = format!("install CRIU {OLDEST} or later on both nodes");
    let reason = if target.criu_version == 0 {
        format!("the target has no working CRIU: {}", target.criu)
    } else if source.criu_version == 0 {
        format!("the source has no working CRIU: {}", source.criu)
    } else if target.criu_version < OLDEST.number() {
        format!("the target's CRIU {} is too old", target.criu)
    } else if source.criu_version < OLDEST.number() {
        format!("the source's CRIU {} is too old", source.criu)
    } else if minor(target) < minor(source) {
        format!("the target's CRIU {} cannot read images of {}", target.criu, source.criu)
    } else {
        return None;
    };
    Some(Refusal::new(Code::Criu, reason, install))
}

/// A program may use whatever its CPU announced when it started.
fn cpu(source: &Host, target: &Host) -> Option<Refusal> {
    let there: HashSet<_> = target.cpu_flags.iter().collect();
    // On arm64 every feature is one that programs are told of.
    let all = source.architecture != "x86_64";
    let lacking: Vec<_> = source
        .cpu_flags
        .iter()
        .filter(|flag| (all || is_for_programs(flag)) && !there.contains(flag))
        .map(String::as_str)
        .collect();
    (!lacking.is_empty()).then(|| {
        Refusal::new(
            Code::Cpu,
            format!(
                "the target's CPU lacks {}, which programs on the source may use",
                lacking.join(", ")
            ),
            "move to a node whose CPU has all features of this one, \
             or run virtual machines with a common CPU model",
        )
    })
}

/// Of the x86 flags the kernel lists, those that programs see and use; the
/// rest (mitigations, virtualisation, what the kernel keeps to itself) may
/// differ between kernels on the same CPU.
fn is_for_programs(flag: &str) -> bool {
    const FAMILIES: [&str; 6] = ["sse", "avx", "amx_", "xsave", "3dnow", "sha"];
    const NAMES: [&str; 40] = [
        "fpu",
        "mmx",
        "mmxext",
        "fxsr",
        "cx8",
        "cx16",
        "cmov",
        "tsc",
        "ssse3",
        "pni",
        "fma",
        "fma4",
        "f16c",
        "xop",
        "tbm",
        "aes",
        "vaes",
        "pclmulqdq",
        "vpclmulqdq",
        "gfni",
        "bmi1",
        "bmi2",
        "abm",
        "popcnt",
        "movbe",
        "adx",
        "rdrand",
        "rdseed",
        "rdtscp",
        "rdpid",
        "fsgsbase",
        "rtm",
        "hle",
        "clflushopt",
        "clwb",
        "movdiri",
        "movdir64b",
        "serialize",
        "waitpkg",
        "pku",
    ];
    FAMILIES.iter().any(|family| flag.starts_with(family)) || NAMES.contains(&flag)
}

fn names(offer: &Checked, here: &Facts) -> Option<Refusal> {
    let what = here.taken.as_ref()?;
    Some(Refusal::new(
        Code::NameTaken,
        format!("{what} named {} exists on the target", offer.key),
        "remove it there first",
    ))
}

fn programs(offer: &Checked, here: &Facts) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    if !here.shim {
        refusals.push(Refusal::new(
            Code::Runtime,
            format!("the target has no shim for the runtime {}", offer.record.runtime),
            "install containerd-shim-transship-v2 in a directory of containerd's PATH there",
        ));
    }
    if !here.oci_runtime {
        refusals.push(Refusal::new(
            Code::Runtime,
            format!(
                "the OCI runtime of the source, {}, is not installed on the target",
                offer.runtime
            ),
            "install it there",
        ));
    }
    if !here.has_snapshotter {
        refusals.push(Refusal::new(
            Code::Daemon,
            format!("the target's containerd has no snapshotter {:?}", offer.record.snapshotter),
            "configure the same snapshotter on both nodes",
        ));
    }
    refusals
}

fn surroundings(offer: &Checked, here: &Facts) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    match offer.spec.network() {
        Network::New => {}
        Network::Host => refusals.push(Refusal::new(
            Code::HostNetwork,
            format!("{} uses the network of its host", offer.key),
            "start it in a network namespace of its own (without --net-host)",
        )),
        Network::At(path) => {
            // A process of the source; the same number here is another one.
            if path.starts_with("/proc/") || here.absent_paths.contains(&path) {
                refusals.push(Refusal::new(
                    Code::Mount,
                    format!("the network namespace {path} does not exist on the target"),
                    format!("make it there first (ip netns add {})", last(&path)),
                ));
            }
        }
    }
    for mount in offer.spec.bind_mounts() {
        let own = DAEMONS_OWN.iter().any(|prefix| mount.source.starts_with(prefix));
        if !own && here.absent_paths.contains(&mount.source) {
            refusals.push(Refusal::new(
                Code::Mount,
                format!(
                    "{}, mounted at {}, does not exist on the target",
                    mount.source, mount.destination
                ),
                "make it there, or put it on storage that both nodes share",
            ));
        }
    }
    refusals
}

fn room(offer: &Checked, here: &Facts, limits: &Limits) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let missing: HashSet<_> = here.missing.iter().collect();
    let content: u64 = offer
        .content
        .iter()
        .filter(|blob| missing.contains(&blob.digest))
        .map(|blob| blob.size.unsigned_abs())
        .fold(0, u64::saturating_add);
    let mut check = |what: String, wanted: u64, free: u64, reserve_mib: u64, help: &str| {
        let reserve = reserve_mib.saturating_mul(1 << 20);
        if wanted.saturating_add(reserve) > free {
            refusals.push(Refusal::new(
                Code::Space,
                format!(
                    "the target has {} of {what} left; {} are needed, and {} are to stay free",
                    mib(free),
                    mib(wanted),
                    mib(reserve)
                ),
                help,
            ));
        }
    };
    let disk = content.saturating_mul(UNPACKED).saturating_add(offer.rootfs_bytes);
    check(
        "disk".into(),
        disk,
        here.disk_free,
        limits.disk_reserve_mib,
        "free some below containerd's root there, or lower limits.disk_reserve_mib",
    );
    check(
        format!("memory (within {})", here.memory.bound_by),
        memory_needed(offer.memory_bytes),
        here.memory.bytes,
        limits.memory_reserve_mib,
        "free some there or raise that limit, or lower limits.memory_reserve_mib",
    );
    refusals
}

/// Pages that have arrived wait on the target until they are placed, and are
/// given back as they are: there is one copy and what belongs to it.
pub fn memory_needed(memory_bytes: u64) -> u64 {
    memory_bytes.saturating_add(memory_bytes / PART_BESIDE_PAGES).saturating_add(BESIDE_PAGES)
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Whether containerd could start this runtime here.
pub fn has_shim(runtime: &str) -> bool {
    shim_binary(runtime).is_some_and(|name| installed(&name))
}

/// The program containerd starts for a runtime: `io.containerd.NAME.VERSION`
/// is `containerd-shim-NAME-VERSION`; a path is itself.
fn shim_binary(runtime: &str) -> Option<PathBuf> {
    if runtime.starts_with('/') {
        return Some(runtime.into());
    }
    let mut parts = runtime.rsplit('.');
    let (version, name) = (parts.next()?, parts.next()?);
    parts.next().map(|_| format!("containerd-shim-{name}-{version}").into())
}

/// Daemons are often started with a shorter PATH than containerd.
fn installed(program: &Path) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];
    let is_program = |path: PathBuf| {
        fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    // Joining an absolute path gives that path, in whichever directory.
    env::split_paths(&path).chain(usual.map(PathBuf::from)).any(|dir| is_program(dir.join(program)))
}

#[cfg(test)]
#[path = "preflight_tests.rs"]
mod tests;
