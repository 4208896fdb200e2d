//! The container's own tmpfs mounts, which travel beside CRIU's images.
//!
//! CRIU is told that they are external: on the source it saves nothing of
//! them, and the shim reads them once the dump is done; on the target it binds
//! what a child of the shim has made ([`filler`]). No program is started for
//! them in the pause.
//!
//! Among CRIU's images are then a list ([`LIST`]) and, for each mount in it, a
//! stream as for the writable layer ([`contents_of`]).

mod filler;
mod incoming;

use std::{
    collections::HashSet,
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
    sync::Arc,
};

use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use transship_api::criu::CriuOpts;
use transship_criu::{Amendments, images::MemoryDir};
use transship_migration::{MigrationError, chain};
use transship_rootfs::tmpfs::{Held, Left, Plan, Why, plan};

pub use self::{
    filler::fill_if_asked,
    incoming::{DIRECTORY, Incoming},
};
use crate::{
    error::{Error, Result},
    mounts,
};

/// Image with what is mounted, as JSON.
const LIST: &str = "transship-tmpfs.json";

/// Written in pieces that cost few calls.
const PIECE: usize = 1 << 20;

/// One mount of the list. The target checks every word of it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    source: String,
    /// As mountinfo shows them.
    options: String,
}

/// The image with the contents of mount `number` of the list.
fn contents_of(number: usize) -> String {
    format!("transship-tmpfs-{number}.img")
}

/// By which CRIU's images know mount `number` of the list.
fn key_of(number: usize) -> String {
    format!("transship-tmpfs-{number}")
}

/// The tmpfs mounts of a container that leaves.
pub struct Outgoing {
    init: i32,
    held: Arc<Vec<Held>>,
}

impl Outgoing {
    /// Finds and holds them, while the container runs. Those that cannot be
    /// had are CRIU's, as all are without us. `request` is what the OCI
    /// runtime wants of CRIU.
    pub async fn hold(init: i32, request: &CriuOpts) -> Self {
        let external = external(request);
        let (held, left) =
            mounts::on_own_thread(move || held(init, &external)).await.unwrap_or_else(|error| {
                warn!(error = error.sentence(), "CRIU saves every tmpfs of the container");
                Default::default()
            });
        for left in left {
            info!(%left, "CRIU saves a tmpfs");
        }
        Self { init, held: Arc::new(held) }
    }

    /// CRIU is to leave them to us.
    pub fn amend(&self, request: &mut Amendments<'_>) {
        for (number, held) in self.held.iter().enumerate() {
            request.external_mount(held.mount().point(), &key_of(number));
        }
    }

    /// Everything stands still, and CRIU has made whatever it makes in them.
    pub async fn save(&self, images: Arc<MemoryDir>) -> std::result::Result<(), MigrationError> {
        if self.held.is_empty() {
            return Ok(());
        }
        let (init, held) = (self.init, self.held.clone());
        let saved = tokio::task::spawn_blocking(move || save(init, &held, &images));
        saved.await.map_err(|error| MigrationError::runtime("dump", error.to_string()))?
    }
}

/// Mount points that the OCI runtime has taken over.
fn external(request: &CriuOpts) -> HashSet<String> {
    let named = request.external.iter().filter_map(|external| {
        let (key, _) = external.strip_prefix("mnt[")?.split_once(']')?;
        Some(key.to_owned())
    });
    request.ext_mnt.iter().map(|mount| mount.key.clone()).chain(named).collect()
}

/// On a thread of its own, which stays in the container's mount namespace.
fn held(init: i32, external: &HashSet<String>) -> Result<(Vec<Held>, Vec<Left>)> {
    if !has_its_own(init, "mnt")? {
        // What is mounted is the node's.
        return Ok(Default::default());
    }
    let Plan { ours, mut left } = plan(&table(init)?, external);
    if has_its_own(init, "user")? {
        // What may be done in them is that namespace's business.
        let theirs = |point: &str| Left { point: point.into(), why: Why::Users };
        left.extend(ours.iter().map(|tmpfs| theirs(tmpfs.point())));
        return Ok((Vec::new(), left));
    }
    let path = format!("/proc/{init}/ns/mnt");
    let namespace = File::open(&path).map_err(Error::io(format!("open {path}")))?;
    let enter =
        unshare(CloneFlags::CLONE_FS).and_then(|()| setns(namespace, CloneFlags::CLONE_NEWNS));
    enter.map_err(Error::errno("enter the mount namespace", Path::new(&path)))?;
    let mut held = Vec::new();
    for tmpfs in ours {
        match tmpfs.hold() {
            Ok(one) => held.push(one),
            Err(one) => left.push(one),
        }
    }
    Ok((held, left))
}

fn table(init: i32) -> Result<Vec<u8>> {
    let path = format!("/proc/{init}/mountinfo");
    std::fs::read(&path).map_err(Error::io(format!("read {path}")))
}

/// Whether its namespace of this kind is another than ours.
fn has_its_own(init: i32, kind: &str) -> Result<bool> {
    let of = |pid: &str| {
        let path = format!("/proc/{pid}/ns/{kind}");
        std::fs::read_link(&path).map_err(Error::io(format!("read {path}")))
    };
    Ok(of("self")? != of(&init.to_string())?)
}

fn save(init: i32, held: &[Held], images: &MemoryDir) -> std::result::Result<(), MigrationError> {
    let table = table(init).map_err(|error| MigrationError::runtime("dump", error.sentence()))?;
    // CRIU has been told to leave these alone, and now there are others.
    if let Some(held) = held.iter().find(|held| held.mount().is_replaced(&table)) {
        let point = held.mount().point();
        let what = format!("what is mounted on {point} changed just before the freeze; try again");
        return Err(MigrationError::runtime("dump", what));
    }
    let mut list = Vec::new();
    for (number, held) in held.iter().enumerate() {
        let name = contents_of(number);
        let file = images.create_file(&name).map_err(|error| failed(held, &error))?;
        let mut file = BufWriter::with_capacity(PIECE, file);
        held.send(&mut |bytes| file.write_all(bytes)).map_err(|error| failed(held, &error))?;
        file.flush().map_err(|source| MigrationError::Image { name, source })?;
        let mount = held.mount();
        list.push(Entry { source: mount.source.clone(), options: mount.options.to_string() });
    }
    let json = serde_json::to_vec(&list).map_err(io::Error::from);
    let written = json.and_then(|json| {
        let file = images.create_file(LIST).map_err(io::Error::other);
        file?.write_all(&json)
    });
    written.map_err(|source| MigrationError::Image { name: LIST.into(), source })
}

fn failed(held: &Held, error: &dyn std::error::Error) -> MigrationError {
    let point = held.mount().point();
    MigrationError::runtime("dump", format!("save the tmpfs {point}: {}", chain(error)))
}

#[cfg(test)]
mod tests {
    use transship_api::criu::ExtMountMap;

    use super::*;

    #[test]
    fn what_the_runtime_has_taken_over_is_known_in_both_forms() {
        let request = CriuOpts {
            ext_mnt: vec![ExtMountMap { key: "/proc/keys".into(), val: "/dev/null".into() }],
            external: ["mnt[/etc/hosts]:hosts", "net[5]:extRootNetNS", "mnt[]:m", "mnt[/odd"]
                .map(str::to_owned)
                .into(),
            ..CriuOpts::default()
        };
        let wanted = ["/proc/keys", "/etc/hosts", ""].map(str::to_owned).into();
        assert_eq!(external(&request), wanted);
    }
}
