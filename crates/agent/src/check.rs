//! Whether this node can send and receive containers, and whether a peer can
//! take them from here. Each line is one fact, with what to do about it.

use std::{os::unix::fs::PermissionsExt, time::Duration};

use transship_api::{
    control::CheckResult,
    session::{Probe, agent_message::Message},
};
use transship_criu::features::OLDEST;
use transship_link::connect_agent;
use transship_types::Refusal;

use crate::{
    failure::{Failure, Step, from_session},
    node::Node,
    preflight, talk,
};

/// The peer probes its CRIU.
const ANSWER: Duration = Duration::from_secs(30);

/// The first Linux whose sockets have an option that CRIU before 4.2 does not
/// know; and, for the scan of written pages, the first with PAGEMAP_SCAN.
const PAGEMAP_SCAN: (u32, u32) = (6, 7);

pub async fn check(node: &Node, peer: &str) -> Vec<CheckResult> {
    let mut results = here(node).await;
    if !peer.is_empty() {
        results.extend(there(node, peer).await);
    }
    results
}

async fn here(node: &Node) -> Vec<CheckResult> {
    let host = node.host().await;
    let mut results = vec![
        good("node", format!("{} ({})", node.name(), host.architecture)),
        kernel(&host.kernel),
        good("cgroups", format!("version {}", host.cgroup_version)),
    ];
    results.push(if host.criu_version >= OLDEST.number() {
        good("CRIU", host.criu)
    } else {
        bad("CRIU", host.criu, &format!("install CRIU {OLDEST} or later"))
    });
    results.push(match node.daemon.version().await {
        Ok(version) => good("daemon", version),
        Err(error) => failed("daemon", &Failure::from(error)),
    });
    results.push(runtime(node));
    results.push(key(node));
    results
}

fn kernel(release: &str) -> CheckResult {
    let mut parts = release.split(['.', '-']).map(|p| p.parse::<u32>().ok());
    let version = (parts.next().flatten().unwrap_or(0), parts.next().flatten().unwrap_or(0));
    let scan = if version >= PAGEMAP_SCAN { "" } else { " (without PAGEMAP_SCAN)" };
    good("kernel", format!("{release}{scan}"))
}

/// One of the names is enough: they are the same program.
fn runtime(node: &Node) -> CheckResult {
    let names = &node.config.runtimes;
    match names.iter().find(|name| preflight::has_shim(name)) {
        Some(name) => good("runtime", name.clone()),
        None => bad(
            "runtime",
            format!("no shim for {} in PATH", names.join(", ")),
            "install containerd-shim-transship-v2 in /usr/local/bin",
        ),
    }
}

fn key(node: &Node) -> CheckResult {
    let path = &node.config.credentials.key;
    match std::fs::metadata(path) {
        Ok(meta) if meta.permissions().mode() & 0o077 == 0 => {
            good("certificate", format!("names {}", node.name()))
        }
        Ok(_) => bad(
            "certificate",
            format!("the key {} can be read by others", path.display()),
            &format!("chmod 600 {}", path.display()),
        ),
        Err(e) => bad("certificate", format!("{}: {e}", path.display()), "issue it again"),
    }
}

async fn there(node: &Node, peer: &str) -> Vec<CheckResult> {
    match probe(node, peer).await {
        Err(failure) => vec![failed(&format!("to {peer}"), &failure)],
        Ok((summary, refusals)) => {
            let mut results = vec![good(&format!("to {peer}"), summary)];
            results.extend(refusals.iter().map(|r| refusal(&format!("to {peer}"), r)));
            results
        }
    }
}

async fn probe(node: &Node, peer: &str) -> Step<(String, Vec<Refusal>)> {
    let to = node.find(peer)?;
    let channel = connect_agent(&node.trust, &to.address, &to.name).await?;
    match talk::ask(channel, Message::Probe(Probe {}), ANSWER).await? {
        Message::ProbeResult(result) => {
            let there = result.host.unwrap_or_default();
            let mut refusals: Vec<_> = result.refusals.into_iter().map(from_session).collect();
            refusals.extend(preflight::hosts(&node.host().await, &there));
            let summary = format!(
                "{} at {}: Linux {}, CRIU {}, {}",
                to.name, to.address, there.kernel, there.criu, there.architecture
            );
            Ok((summary, refusals))
        }
        other => Err(talk::out_of_place(&to.name, &other)),
    }
}

fn good(name: &str, detail: String) -> CheckResult {
    CheckResult { name: name.into(), ok: true, detail, ..Default::default() }
}

fn bad(name: &str, detail: String, remedy: &str) -> CheckResult {
    CheckResult { name: name.into(), detail, remedy: remedy.into(), ..Default::default() }
}

fn refusal(name: &str, refusal: &Refusal) -> CheckResult {
    bad(name, refusal.reason.clone(), &refusal.remedy)
}

fn failed(name: &str, failure: &Failure) -> CheckResult {
    let remedy = failure.0.first().map(|r| r.remedy.clone()).unwrap_or_default();
    bad(name, failure.sentence(), &remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_told() {
        for (release, old) in
            [("6.1.0-32-amd64", true), ("6.7.0", false), ("6.18.2+deb13", false), ("7.0", false)]
        {
            assert_eq!(kernel(release).detail.contains("without"), old, "{release}");
        }
    }
}
