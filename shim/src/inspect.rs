//! What keeps a container from being moved, asked before anything is touched.

use std::fs;

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use transship_api::control::{InspectResponse, Refusal as Wire};
use transship_criu::features;
use transship_types::{Code, Refusal};

use crate::{
    cgroup::Cgroup,
    container::{Container, Status},
    depart::layer,
    error::{Error, Result},
    netns,
    tree::{self, Stranger},
};

pub async fn inspect(container: &Container) -> Result<InspectResponse> {
    let report = container.state("").await?;
    let context = container.context();
    let mut refusals = Vec::new();
    if let Some(refusal) = by_status(report.status) {
        refusals.push(refusal);
    }
    refusals.extend(by_spec(&context.spec()?));
    let cgroup = match report.pid {
        0 => None,
        pid => Cgroup::of_process(pid as i32).ok(),
    };
    if report.pid > 0 {
        refusals.extend(by_interfaces(&netns::interfaces(report.pid as i32).await?));
    }
    if let Some(cgroup) = &cgroup {
        refusals.extend(by_strangers(&tree::strangers(cgroup, report.pid)?));
        refusals.extend(by_obstacles(&cgroup.pids()?));
    }

    let mut response = InspectResponse::new();
    match features::probe().await {
        Ok(installed) => {
            response.criu = installed.version.to_string();
            if !installed.is_recent_enough() {
                refusals.push(Refusal::new(
                    Code::Criu,
                    format!("CRIU {} on this node is too old", installed.version),
                    format!("install CRIU {} or later", features::OLDEST),
                ));
            }
        }
        Err(error) => {
            refusals.push(Refusal::new(Code::Criu, error.to_string(), "install CRIU"));
        }
    }
    match layer(context) {
        // A walk over every file, which others need not wait for.
        Ok(layer) => {
            let walk = tokio::task::spawn_blocking(move || layer.bytes());
            response.rootfs_bytes =
                walk.await.map_err(Error::other("measure the writable layer"))?;
        }
        Err(error) => refusals.push(Refusal::new(Code::Mount, error.sentence(), "")),
    }
    response.status = status_word(report.status).into();
    response.pid = report.pid;
    response.post_copy = true;
    response.runtime = context.oci.binary().display().to_string();
    if let Some(cgroup) = &cgroup {
        response.memory_bytes =
            cgroup.memory_bytes().unwrap_or_else(|_| resident_bytes(report.pid));
    }
    response.refusals = refusals.into_iter().map(to_wire).collect();
    Ok(response)
}

fn by_status(status: Status) -> Option<Refusal> {
    let (reason, remedy) = match status {
        Status::Running => return None,
        Status::Created => ("it has not been started", "start it first"),
        Status::Pausing | Status::Paused => ("it is paused", "resume it first"),
        Status::Stopped => ("it has stopped", "there is nothing left to move; start it anew there"),
    };
    Some(Refusal::new(Code::NotRunning, reason, remedy))
}

/// What the spec shares with the host or with another container stays behind.
fn by_spec(spec: &Spec) -> Vec<Refusal> {
    let namespaces =
        spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    let find = |wanted| namespaces.iter().find(|namespace| namespace.typ() == wanted);
    let mut refusals = Vec::new();
    match find(LinuxNamespaceType::Network) {
        None => refusals.push(Refusal::new(
            Code::HostNetwork,
            "it uses the host's network",
            "run it with a network namespace of its own",
        )),
        Some(namespace) => {
            if let Some(path) = namespace.path() {
                refusals.push(Refusal::new(
                    Code::Unsupported,
                    format!("its network namespace {} was made by somebody else", path.display()),
                    "run it without a prepared network namespace",
                ));
            }
        }
    }
    if find(LinuxNamespaceType::Pid).is_none() {
        refusals.push(Refusal::new(
            Code::Unsupported,
            "it shares the host's processes",
            "run it with a pid namespace of its own",
        ));
    }
    refusals
}

/// The interfaces of a container are its host's: they do not come along, and
/// neither would a connection through them.
fn by_interfaces(names: &[String]) -> Option<Refusal> {
    if names.is_empty() {
        return None;
    }
    Some(Refusal::new(
        Code::Unsupported,
        format!("it is connected to a network ({})", names.join(", ")),
        "only containers without network interfaces beside loopback can be moved yet",
    ))
}

/// CRIU dumps a tree; a process that was put in from outside is in none.
fn by_strangers(strangers: &[Stranger]) -> Option<Refusal> {
    if strangers.is_empty() {
        return None;
    }
    let names: Vec<String> =
        strangers.iter().map(|stranger| format!("{} ({})", stranger.name, stranger.pid)).collect();
    Some(Refusal::new(
        Code::Unsupported,
        format!("processes were started in it from outside: {}", names.join(", ")),
        "wait until these exec sessions have ended, or end them",
    ))
}

/// What CRIU would find out in the middle of its dump.
fn by_obstacles(pids: &[u32]) -> Option<Refusal> {
    let pids = pids.iter().filter_map(|pid| i32::try_from(*pid).ok());
    let found: Vec<String> = pids.flat_map(transship_memory::obstacles).collect();
    if found.is_empty() {
        return None;
    }
    Some(Refusal::new(
        Code::Unsupported,
        found.join("; "),
        "see whether the program can do without it",
    ))
}

fn status_word(status: Status) -> &'static str {
    match status {
        Status::Created => "CREATED",
        Status::Running => "RUNNING",
        Status::Pausing => "PAUSING",
        Status::Paused => "PAUSED",
        Status::Stopped => "STOPPED",
    }
}

/// Without a memory cgroup: what the first process holds (proc_pid_statm(5)).
fn resident_bytes(pid: u32) -> u64 {
    const PAGE: u64 = 4096;
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|text| text.parse::<u64>().ok());
    pages.unwrap_or_default() * PAGE
}

fn to_wire(refusal: Refusal) -> Wire {
    let mut wire = Wire::new();
    wire.code = refusal.code.to_string();
    wire.reason = refusal.reason;
    wire.remedy = refusal.remedy;
    wire
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(json: &str) -> Vec<Code> {
        let spec: Spec = serde_json::from_str(json).unwrap();
        by_spec(&spec).iter().map(|refusal| refusal.code).collect()
    }

    #[test]
    fn what_is_shared_with_the_host_is_refused() {
        let own =
            r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"network"},{"type":"pid"}]}}"#;
        assert_eq!(codes(own), []);
        let pod = r#"{"ociVersion":"1.0.2","linux":{"namespaces":[
            {"type":"network","path":"/run/netns/pod"},{"type":"pid"}]}}"#;
        assert_eq!(codes(pod), [Code::Unsupported]);
        let host = r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"mount"}]}}"#;
        assert_eq!(codes(host), [Code::HostNetwork, Code::Unsupported]);
    }

    #[test]
    fn only_a_running_container_moves() {
        assert_eq!(by_status(Status::Running), None);
        for status in [Status::Created, Status::Pausing, Status::Paused, Status::Stopped] {
            assert_eq!(by_status(status).unwrap().code, Code::NotRunning);
        }
    }
}
