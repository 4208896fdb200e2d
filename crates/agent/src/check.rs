//! Whether this node can send and receive containers, and whether a peer can
//! take them from here. Each line is one fact, with what to do about it.

use std::{os::unix::fs::PermissionsExt, time::Duration};

use time::OffsetDateTime;
use transship_api::{
    control::CheckResult,
    session::{Probe, agent_message::Message},
};
use transship_criu::features::OLDEST;
use transship_link::connect_agent;
use transship_memory::{Backend, Memory, Tracker, Want};
use transship_types::Refusal;

use crate::{
    failure::{Failure, Step, chain},
    host,
    node::Node,
    preflight, talk,
};

/// The peer probes its CRIU.
const ANSWER: Duration = Duration::from_secs(30);

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
        good("kernel", host.kernel),
        memory(),
        mappings(),
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
    results.extend(certificate(node));
    results
}

/// How writes to memory would be noticed here. Without a way containers can
/// still move, with all of their memory inside the pause.
fn memory() -> CheckResult {
    let nobody = || Box::new(|| Ok(Vec::new()));
    let tracker = match Tracker::new(nobody(), Want::Best) {
        Ok(tracker) => tracker,
        Err(error) => return bad("memory", chain(&error), "see docs/memory.md"),
    };
    let better = Tracker::new(nobody(), Want::Only(Backend::WriteProtect)).err();
    let why = better.map(|error| format!(" ({error})")).unwrap_or_default();
    let detail = match tracker.backend() {
        Backend::None if !host::may_watch() => {
            "not seen from here: that takes CAP_SYS_PTRACE, which shims have and transshipd does \
             without"
                .to_string()
        }
        Backend::None => format!("writes cannot be noticed: pauses grow with memory{why}"),
        backend => format!("writes are noticed by {}{why}", backend.as_str()),
    };
    good("memory", detail)
}

/// Whether CRIU is spared a walk over all pages within the pause. Without that
/// containers still move.
fn mappings() -> CheckResult {
    let detail = match transship_criu::lists_mappings() {
        Ok(()) => "listed without a look at their pages".into(),
        Err(error) => format!("CRIU reads smaps: pauses grow with memory ({})", chain(&error)),
    };
    good("mappings", detail)
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
            good("key", path.display().to_string())
        }
        Ok(_) => bad(
            "key",
            format!("the key {} can be read by others", path.display()),
            &format!("chmod 600 {}", path.display()),
        ),
        Err(e) => bad("key", format!("{}: {e}", path.display()), "issue it again"),
    }
}

/// What is in use, and what of the files is not.
fn certificate(node: &Node) -> Vec<CheckResult> {
    let identity = node.identities.current();
    let mut results = match identity.trust.vet() {
        Ok(()) => {
            let until = identity.trust.until().date();
            vec![good("certificate", format!("names {}, until {until}", node.name()))]
        }
        Err(error) => return vec![failed("certificate", &Failure::from(error))],
    };
    for (detail, remedy) in identity.warnings(OffsetDateTime::now_utc()) {
        results.push(CheckResult { remedy, ..good("certificate", detail) });
    }
    if let Some(why) = node.identities.refused() {
        let detail = format!("{why}; what was read before stays in use");
        let remedy = "put it right and `systemctl reload transshipd`";
        results.push(bad("certificate", detail, remedy));
    }
    results
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
    let channel = connect_agent(&node.trust(), &to.address, &to.name).await?;
    match talk::ask(channel, Message::Probe(Probe {}), ANSWER).await? {
        Message::ProbeResult(result) => {
            let there = result.host.unwrap_or_default();
            let refusals = preflight::hosts(&node.host().await, &there);
            let summary = format!(
                "{} at {}: Linux {}, CRIU {}, {}",
                to.name, to.address, there.kernel, there.criu, there.architecture
            );
            Ok((summary, refusals))
        }
        Message::Failure(failure) => Err(Failure::from_message(&to.name, failure)),
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

    /// Whatever this kernel has, it has a name.
    #[test]
    fn the_way_to_notice_writes_is_told() {
        let told = memory();
        assert!(
            told.ok && ["noticed", "not seen from here"].iter().any(|w| told.detail.contains(w)),
            "{told:?}"
        );
    }

    #[test]
    fn how_criu_learns_of_mappings_is_told() {
        let told = mappings();
        let either = ["listed", "CRIU reads smaps"];
        assert!(told.ok && either.iter().any(|text| told.detail.contains(text)), "{told:?}");
    }
}
