//! The network namespace of a container: what a restore does not bring along.
//!
//! runc and crun tell CRIU to leave the network namespace empty, because
//! devices are not theirs. A fresh container gets its loopback interface set
//! up by them, a restored one does not; without it a connection of the
//! container to itself cannot even be restored. So we do it, between the
//! making of the namespace and the restore of the sockets.

use std::{fs::File, io, path::PathBuf, process::Command, thread};

use nix::{
    ifaddrs::getifaddrs,
    net::if_::InterfaceFlags,
    sched::{CloneFlags, setns, unshare},
};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use tokio::sync::oneshot;

use crate::{
    error::{Error, Result},
    sys,
};

/// Whether the OCI runtime makes the network namespace, so that nobody else
/// sets it up.
pub fn is_made_by_runtime(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_none()
    })
}

/// Whether CRIU may be inside the namespace instead of making it and looking
/// through it from outside: one made by us would belong to the host, where a
/// container with users of its own could not set it up.
pub fn can_be_shared(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let own_users = namespaces
        .into_iter()
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    is_made_by_runtime(spec) && !own_users
}

/// The network namespace of a container whose CRIU can be in there: nothing
/// but loopback, since CRIU then leaves new connections from outside alone.
pub async fn shared_with(pid: i32, spec: &Spec) -> Option<PathBuf> {
    if !can_be_shared(spec) {
        return None;
    }
    let quiet = interfaces(pid).await.is_ok_and(|others| others.is_empty());
    quiet.then(|| PathBuf::from(format!("/proc/{pid}/ns/net")))
}

/// A fresh namespace with its loopback interface up, in which a container is
/// to be restored. It lasts as long as the file is open, or somebody is in it.
pub async fn make() -> Result<File> {
    on_a_thread("make a network namespace".to_owned(), || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        sys::interface_up("lo")?;
        File::open("/proc/thread-self/ns/net")
    })
    .await
}

/// Sets the loopback interface up in the namespace that CRIU has just made
/// for the restored process `pid`.
pub async fn set_up(pid: i32) {
    if let Err(error) = inside(pid, || sys::interface_up("lo")).await {
        // A container that does not talk to itself does not need it; one that
        // does fails to restore, and then this is the reason.
        tracing::warn!(error = error.sentence(), "no loopback interface");
    }
}

/// Removes the packet filter of a CRIU that was killed: it drops every packet
/// of the container, for good. For a namespace that is the container's own,
/// with no CRIU at work in it.
pub async fn unlock(pid: i32) {
    if let Err(error) = inside(pid, remove_locks).await {
        tracing::warn!(error = error.sentence(), "CRIU's packet filter may still be there");
    }
}

fn remove_locks() -> io::Result<()> {
    let listed = match Command::new("nft").args(["list", "tables", "inet"]).output() {
        // Then CRIU has used iptables, and this is not for us.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        listed => listed?,
    };
    for table in locks(&String::from_utf8_lossy(&listed.stdout)) {
        tracing::warn!(table, "CRIU has left its packet filter behind");
        let removed = Command::new("nft").args(["delete", "table", "inet", table]).output()?;
        if !removed.status.success() {
            return Err(io::Error::other(String::from_utf8_lossy(&removed.stderr).into_owned()));
        }
    }
    Ok(())
}

/// As CRIU names them (`network_lock_nftables_internal`).
fn locks(listed: &str) -> impl Iterator<Item = &str> {
    let names = listed.lines().filter_map(|line| line.strip_prefix("table inet "));
    names.filter(|name| name.starts_with("CRIU-"))
}

/// Interfaces beside loopback that are up in the namespace of `pid`.
pub async fn interfaces(pid: i32) -> Result<Vec<String>> {
    let list = || {
        let mut names: Vec<String> = getifaddrs()?
            .filter(|interface| {
                interface.flags.contains(InterfaceFlags::IFF_UP)
                    && !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK)
            })
            .map(|interface| interface.interface_name)
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    };
    inside(pid, list).await
}

/// Runs `work` in the network namespace of `pid`.
async fn inside<T: Send + 'static>(
    pid: i32,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T> {
    on_a_thread(format!("look into the network namespace of process {pid}"), move || {
        let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        work()
    })
    .await
}

/// On a thread of its own: one that has been elsewhere must not do anything
/// else.
async fn on_a_thread<T: Send + 'static>(
    doing: String,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T> {
    let (done, result) = oneshot::channel();
    thread::Builder::new()
        .name("netns".into())
        .spawn(move || {
            let _ = done.send(work());
        })
        .map_err(Error::io(doing.clone()))?;
    let gone = || io::Error::other("the thread has panicked");
    result.await.unwrap_or_else(|_| Err(gone())).map_err(Error::io(doing))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_criu_s_own_tables_are_locks() {
        let listed = "table inet filter\ntable inet CRIU-c84d21ca-8505\ntable ip CRIU-1\n";
        assert_eq!(locks(listed).collect::<Vec<_>>(), ["CRIU-c84d21ca-8505"]);
        assert_eq!(locks("").count(), 0);
    }

    #[test]
    fn a_namespace_with_a_path_is_somebody_elses() {
        for (namespaces, ours) in [
            (r#"[{"type":"network"}]"#, true),
            (r#"[{"type":"network","path":"/run/netns/pod"}]"#, false),
            (r#"[{"type":"pid"}]"#, false),
        ] {
            let spec = format!(r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":{namespaces}}}}}"#);
            let spec: Spec = serde_json::from_str(&spec).unwrap();
            assert_eq!(is_made_by_runtime(&spec), ours, "{namespaces}");
            assert_eq!(can_be_shared(&spec), ours, "{namespaces}");
        }
        let spec = r#"{"ociVersion":"1.0.2","linux":{"namespaces":[
            {"type":"network"},{"type":"user"}]}}"#;
        assert!(!can_be_shared(&serde_json::from_str(spec).unwrap()));
    }
}
