//! Each reason alone, and all of them together.

use super::*;
use crate::offer::{self, tests::digest};

fn host() -> Host {
    Host {
        kernel: "6.12.0".into(),
        architecture: "x86_64".into(),
        cpu_flags: ["fpu", "sse2", "avx2", "ibrs"].map(String::from).to_vec(),
        criu: "4.2.1".into(),
        criu_version: 40201,
        page_size: 4096,
        cgroup_version: 2,
    }
}

fn offer_with(spec: &str) -> Checked {
    let mut offer = offer::tests::offer();
    offer.host = Some(host());
    offer.runtime = "runc 1.1.15".into();
    let record = offer.record.as_mut().unwrap();
    record.spec.as_mut().unwrap().value = spec.as_bytes().to_vec().into();
    offer::check(offer).unwrap()
}

fn plain() -> Checked {
    offer_with(r#"{"linux":{"namespaces":[{"type":"network"}]}}"#)
}

fn facts() -> Facts {
    Facts {
        host: host(),
        has_snapshotter: true,
        disk_free: 10 << 30,
        memory: Room { bytes: 10 << 30, bound_by: "the machine".into() },
        shim: true,
        oci_runtime: true,
        ..Default::default()
    }
}

fn codes(refusals: &[Refusal]) -> Vec<Code> {
    refusals.iter().map(|r| r.code).collect()
}

#[test]
fn nothing_speaks_against_a_twin() {
    assert_eq!(judge(&plain(), &facts(), &Limits::default()), []);
}

#[test]
fn each_reason_has_its_code_and_a_remedy() {
    type Change = fn(&mut Facts);
    let changes: [(&str, Code, Change); 14] = [
        ("architecture", Code::Host, |f| f.host.architecture = "aarch64".into()),
        ("page size", Code::Host, |f| f.host.page_size = 65536),
        ("cgroup", Code::Host, |f| f.host.cgroup_version = 1),
        ("no CRIU", Code::Criu, |f| (f.host.criu_version, f.host.criu) = (0, "none".into())),
        ("old CRIU", Code::Criu, |f| f.host.criu_version = 31700),
        ("4.1 for 4.2", Code::Criu, |f| f.host.criu_version = 40101),
        ("no avx2", Code::Cpu, |f| f.host.cpu_flags.retain(|f| f != "avx2")),
        ("name", Code::NameTaken, |f| f.taken = Some("a container".into())),
        ("shim", Code::Runtime, |f| f.shim = false),
        ("runc", Code::Runtime, |f| f.oci_runtime = false),
        ("snapshotter", Code::Daemon, |f| f.has_snapshotter = false),
        ("disk", Code::Space, |f| f.disk_free = 1 << 20),
        ("memory", Code::Space, |f| f.memory.bytes = 1 << 20),
        ("disk for content", Code::Space, |f| {
            // Ten bytes of content become thirty; that is one too many.
            f.missing = vec![digest(1)];
            f.disk_free = (256 << 20) + 29;
        }),
    ];
    for (what, code, change) in changes {
        let mut facts = facts();
        change(&mut facts);
        let refusals = judge(&plain(), &facts, &Limits::default());
        assert_eq!(codes(&refusals), [code], "{what}: {refusals:?}");
        assert!(!refusals[0].remedy.is_empty(), "{what}");
    }
}

#[test]
fn what_only_the_kernel_uses_may_differ() {
    let mut facts = facts();
    facts.host.cpu_flags.retain(|f| f != "ibrs");
    facts.host.cpu_flags.push("avx512f".into());
    assert_eq!(judge(&plain(), &facts, &Limits::default()), []);
}

#[test]
fn criu_may_be_newer_on_the_target_only() {
    for (source, target, good) in [
        (40201, 40201, true),
        (40200, 40203, true),
        (40203, 40200, true),
        (40201, 40300, true),
        (40300, 40201, false),
    ] {
        let (a, b) =
            (Host { criu_version: source, ..host() }, Host { criu_version: target, ..host() });
        assert_eq!(hosts(&a, &b).is_empty(), good, "{source} to {target}");
    }
}

#[test]
fn networks_and_mounts_must_be_there() {
    let spec = r#"{
        "linux":{"namespaces":[{"type":"network","path":"/run/netns/x"}]},
        "mounts":[
            {"destination":"/data","type":"bind","source":"/srv/data","options":["rbind"]},
            {"destination":"/etc/hosts","type":"bind","source":"/var/lib/containerd/h","options":["bind"]},
            {"destination":"/ok","type":"bind","source":"/srv/ok","options":["bind"]}
        ]}"#;
    let offer = offer_with(spec);
    let mut facts = facts();
    assert_eq!(judge(&offer, &facts, &Limits::default()), []);
    facts.absent_paths =
        ["/run/netns/x", "/srv/data", "/var/lib/containerd/h"].map(String::from).into();
    let refusals = judge(&offer, &facts, &Limits::default());
    assert_eq!(codes(&refusals), [Code::Mount, Code::Mount], "{refusals:?}");
    assert!(refusals[1].reason.contains("/srv/data"));

    let refusals = judge(&offer_with("{}"), &facts, &Limits::default());
    assert_eq!(codes(&refusals), [Code::HostNetwork]);
    let of_a_process = r#"{"linux":{"namespaces":[{"type":"network","path":"/proc/77/ns/net"}]}}"#;
    let refusals = judge(&offer_with(of_a_process), &facts, &Limits::default());
    assert_eq!(codes(&refusals), [Code::Mount]);
}

/// One byte less is refused, with whose limit it is.
#[test]
fn memory_needs_room_for_more_than_its_pages() {
    let mut offer = plain();
    offer.memory_bytes = 1 << 30;
    let limits = Limits { memory_reserve_mib: 1, ..Default::default() };
    let enough = (1 << 30) + (32 << 20) + (32 << 20) + (1 << 20);
    let judged = |bytes| {
        let memory = Room { bytes, bound_by: "the control group /pods".into() };
        judge(&offer, &Facts { memory, ..facts() }, &limits)
    };
    assert_eq!(judged(enough), []);
    let refusals = judged(enough - 1);
    assert_eq!(codes(&refusals), [Code::Space]);
    let reason = &refusals[0].reason;
    assert!(
        reason.contains("the control group /pods") && reason.contains("1088 MiB are needed"),
        "{reason}"
    );
}

#[test]
fn every_reason_is_given_at_once() {
    let facts = Facts { taken: Some("a snapshot".into()), ..Default::default() };
    let refusals = judge(&offer_with("{}"), &facts, &Limits::default());
    let found: HashSet<_> = codes(&refusals).into_iter().collect();
    let wanted = [
        Code::Host,
        Code::Criu,
        Code::NameTaken,
        Code::Runtime,
        Code::Daemon,
        Code::HostNetwork,
        Code::Space,
    ];
    assert_eq!(found, wanted.into());
}

#[test]
fn a_runtime_has_its_shim() {
    for (runtime, binary) in [
        ("io.containerd.transship.v2", Some("containerd-shim-transship-v2")),
        ("io.containerd.runc.v2-transship", Some("containerd-shim-runc-v2-transship")),
        ("/opt/shim", Some("/opt/shim")),
        ("transship", None),
        ("a.b", None),
    ] {
        assert_eq!(shim_binary(runtime), binary.map(PathBuf::from), "{runtime}");
    }
    assert!(installed(Path::new("sh")) && installed(Path::new("/bin/sh")));
    assert!(!installed(Path::new("no-such-program")));
}
