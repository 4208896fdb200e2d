//! `transshipd.service` against what the agent needs and what it must not
//! have. Nobody starts systemd here: the unit is read, and judged by
//! `systemd-analyze` where that is installed.

use std::{collections::BTreeMap, process::Command};

use transship_types::paths;

const UNIT: &str = include_str!("../transshipd.service");
/// Of ten, as `systemd-analyze security` counts; a service without a word of
/// this kind has 9.6. What is left is root's, the network's and the view of
/// the host's files, all of which the agent needs.
const EXPOSURE: &str = "35";

/// Everything below `[Service]`.
fn service() -> BTreeMap<&'static str, &'static str> {
    let section = UNIT.split("[Service]").nth(1).unwrap().split("\n[").next().unwrap();
    let lines = section.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let mut found = BTreeMap::new();
    for (key, value) in lines.map(|line| line.split_once('=').unwrap()) {
        assert!(found.insert(key, value).is_none(), "{key} twice");
    }
    found
}

#[test]
fn the_agent_can_do_its_work() {
    let unit = service();
    let is = |key, value| assert_eq!(unit.get(key), Some(&value), "{key}");
    // All that `ProtectSystem=strict` leaves it to write.
    assert_eq!(paths::RUNTIME_DIR, format!("/run/{}", unit["RuntimeDirectory"]));
    assert_eq!(paths::STATE_DIR, format!("/var/lib/{}", unit["StateDirectory"]));
    for path in [paths::AGENT_SOCKET, paths::ARRIVALS_SOCKET] {
        assert!(path.starts_with(paths::RUNTIME_DIR), "{path}");
    }
    // The shims' sockets and gates outlive the agent, and so do the shims.
    is("RuntimeDirectoryPreserve", "yes");
    is("KillMode", "process");
    // Renewed certificates.
    is("ExecReload", "/bin/kill -HUP $MAINPID");
    // Bind mounts of containers are looked for all over the host.
    for hidden in ["PrivateTmp", "PrivateDevices", "RootDirectory", "InaccessiblePaths"] {
        assert_eq!(unit.get(hidden), None, "{hidden}");
    }
    is("ProtectHome", "read-only");
    for family in ["AF_UNIX", "AF_INET", "AF_INET6"] {
        assert!(unit["RestrictAddressFamilies"].contains(family), "{family}");
    }
    // `control.group`, and fifos of containers that run as somebody else.
    assert!(unit["CapabilityBoundingSet"].contains("CAP_CHOWN"));
}

#[test]
fn the_agent_can_do_little_else() {
    let unit = service();
    let is = |key, value| assert_eq!(unit.get(key), Some(&value), "{key}");
    is("UMask", "0077");
    is("RuntimeDirectoryMode", "0700");
    is("StateDirectoryMode", "0700");
    is("ProtectSystem", "strict");
    is("LimitCORE", "0");
    is("SystemCallFilter", "@system-service");
    for key in [
        "NoNewPrivileges",
        "ProtectControlGroups",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "RestrictNamespaces",
        "RestrictSUIDSGID",
        "MemoryDenyWriteExecute",
    ] {
        is(key, "yes");
    }
    for capability in unit["CapabilityBoundingSet"].split(' ') {
        let needed = ["CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_CHOWN"];
        assert!(needed.contains(&capability), "{capability}");
    }
}

/// A directive nobody can explain is one nobody dares to change.
#[test]
fn each_restriction_has_its_reason() {
    let from = UNIT.find("NoNewPrivileges").unwrap();
    let before = &UNIT[..from];
    let start = before.rfind("\n\n").unwrap();
    let mut explained = false;
    for line in UNIT[start..].split("[Install]").next().unwrap().lines() {
        match line {
            "" => {}
            comment if comment.starts_with('#') => explained = true,
            directive => assert!(explained, "{directive}"),
        }
    }
}

#[test]
fn systemd_finds_it_little_exposed() {
    let unit = tempfile::tempdir().unwrap();
    let path = unit.path().join("transshipd.service");
    std::fs::write(&path, UNIT).unwrap();
    let mut analyze = Command::new("systemd-analyze");
    analyze.args(["security", "--offline=true", "--no-pager", "--threshold", EXPOSURE]);
    let analysed = match analyze.arg(&path).output() {
        Ok(analysed) => analysed,
        Err(error) => return eprintln!("skipped: no systemd-analyze: {error}"),
    };
    let said = String::from_utf8_lossy(&analysed.stderr);
    if said.contains("--offline") {
        return eprintln!("skipped: this systemd-analyze is older than 250: {said}");
    }
    let found = String::from_utf8_lossy(&analysed.stdout);
    assert!(analysed.status.success(), "{found}{said}");
}
