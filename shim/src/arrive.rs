//! The arriving end of a migration: Start of a container that was created
//! under a ticket.
//!
//! The daemon waits in Start while the container comes in. CRIU's images stay
//! in a tmpfs without a mount point; the OCI runtime's `restore` is started
//! early and held at the gate, twice: before CRIU gets its request, and before
//! the first instruction runs.

mod inbound;
mod incoming;

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures::future::BoxFuture;
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;
use transship_criu::{Remembered, images::MemoryDir, pages};
use transship_link::arrivals;
use transship_migration::{
    Connecting, Filled, Journal, Manifest, MigrationError, NextConnection, PageStore, Target,
    Wanted, chain,
    journal::{Role, Subject},
    report::Restored,
};
use transship_types::{ContainerKey, Epoch, MigrationId, NodeName, PageSet, Space, Ticket, paths};

use self::inbound::{Inbound, Served};
use crate::{
    container::Revival,
    error::{Error, Result},
    fill::{Arrived, Filling},
    held::{self, Held, LOG_LEVEL},
    netns,
    restore::{DESCRIPTORS, external_descriptors, stand_in},
    tmpfs,
};

/// How long a created container waits for its source. The agents are done
/// with everything else by then; only a source that died makes it this long.
const WAIT: Duration = Duration::from_secs(120);

/// The source connects its lanes as soon as it is told that we wait. One that
/// was lost while pages are owed comes when it can: then we ask anew.
const NEXT: Duration = Duration::from_secs(30);

/// Answers the pid of the first process, a child of ours by then.
///
/// `cancel` ends it up to the commit and is ignored afterwards.
pub async fn arrive(
    revival: &mut Revival,
    ticket: &Ticket,
    cancel: &CancellationToken,
) -> Result<Arrived> {
    let id = revival.id().to_owned();
    let failed = |what: &str| format!("container {id} did not arrive: {what}");
    // After the commit nothing of it may fail any more.
    revival.stdio.rehearse().map_err(Error::other(failed("its output cannot be written here")))?;
    let connected = async {
        let arrival = arrivals::wait(ticket, WAIT)
            .await
            .map_err(Error::other(failed("its source did not come")))?;
        let (peer, migration) = (arrival.peer.clone(), arrival.migration.clone());
        let channel = arrival.accept().await;
        let channel = channel.map_err(Error::other(failed("its source was not accepted")))?;
        Ok((channel, peer, migration))
    };
    let (channel, peer, migration) = tokio::select! {
        connected = connected => connected?,
        () = cancel.cancelled() => return Err(Error::killed_unborn(&id)),
    };
    let images = MemoryDir::create(None)
        .map_err(Error::other(failed("there is no memory for CRIU's images")))?;
    let images = Arc::new(images);
    let inbound =
        Inbound::new(images.clone()).map_err(Error::other(failed("there is no memory for it")))?;
    let failed = format!("container {id} did not arrive from {peer}");
    let tmpfs = tmpfs::Incoming::new(&revival.context.bundle);
    let mut landing = Landing {
        revival,
        tmpfs,
        images,
        peer,
        migration,
        ticket,
        remembered: None,
        held: None,
        inbound,
        network: None,
    };
    let arrived = transship_migration::arrive(channel, &mut landing, ticket, cancel).await;
    // CRIU has its own mounts of them by now.
    landing.tmpfs.remove().await;
    let arrived = arrived.map_err(|error| match error {
        MigrationError::Cancelled => Error::killed_unborn(&id),
        error => Error::other(failed)(error),
    })?;
    let pid = i32::try_from(arrived.pid).map_err(Error::other("a pid that is none"))?;
    let filling = Filling { stop: landing.inbound.stop(), rest: arrived.rest };
    Ok(Arrived { pid, filling: Some(filling) })
}

struct Landing<'a> {
    revival: &'a mut Revival,
    images: Arc<MemoryDir>,
    peer: NodeName,
    /// What the ticket was made for.
    migration: Option<MigrationId>,
    ticket: &'a Ticket,
    remembered: Option<Remembered>,
    held: Option<Held>,
    /// Pages come on lanes of their own.
    inbound: Inbound,
    tmpfs: tmpfs::Incoming,
    /// Made for it, with CRIU in it.
    network: Option<File>,
}

/// For processes that see our `/proc`.
fn own_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()))
}

impl Landing<'_> {
    fn held(&mut self) -> std::result::Result<&mut Held, MigrationError> {
        let missing = || MigrationError::runtime("restore", "it was not prepared");
        self.held.as_mut().ok_or_else(missing)
    }
}

#[async_trait]
impl Target for Landing<'_> {
    fn root(&self) -> PathBuf {
        // A container without a readable spec was refused by Create.
        self.revival.context.root().unwrap_or_else(|_| self.revival.context.bundle.join("rootfs"))
    }

    fn images(&self) -> PathBuf {
        self.images.path()
    }

    async fn prepare(&mut self, manifest: &Manifest) -> std::result::Result<(), MigrationError> {
        let image = |name: &str| {
            let name = name.to_owned();
            move |source| MigrationError::Image { name, source }
        };
        self.remembered = manifest.remembered.as_ref().map(Remembered::from);
        let path = self.images.path().join(DESCRIPTORS);
        fs::write(path, &manifest.descriptors).map_err(image(DESCRIPTORS))?;
        let work = self.revival.context.criu_work();
        fs::create_dir_all(&work).map_err(image("work directory"))?;
        if manifest.lanes > 0 {
            self.inbound.prepare(&work, manifest.memory_bytes)?;
        }
        let images = self.images.path();
        let started = |error: Error| MigrationError::runtime("restore", error.sentence());
        let mut command = self.revival.command(&images, &work).map_err(started)?;
        let external = external_descriptors(&images).map_err(started)?;
        stand_in(&mut command, self.revival, &external).map_err(started)?;
        command.arg(self.revival.id());
        let context = self.revival.context.clone();
        let spec = context.spec().map_err(started)?;
        if netns::can_be_shared(&spec) {
            self.network = Some(netns::make().await.map_err(started)?);
        }
        let network = self.network.as_ref().map(own_path);
        let log = work.join("restore.log");
        let held = Held::start_in(network, held::library(), &context.oci, command, log).await?;
        self.tmpfs.prepare(held.criu_pid())?;
        self.held.insert(held).lock_network_quickly().await
    }

    fn store(&self) -> Option<Arc<dyn PageStore>> {
        Some(self.inbound.store())
    }

    fn next(&self) -> Option<NextConnection> {
        let ticket = self.ticket.clone();
        Some(Arc::new(move || {
            let ticket = ticket.clone();
            Box::pin(async move {
                let arrival = arrivals::wait(&ticket, NEXT).await?;
                let connecting: Connecting = Box::pin(arrival.accept());
                Ok(connecting)
            })
        }))
    }

    async fn needs(
        &mut self,
        present: &[(Space, PageSet)],
    ) -> std::result::Result<Vec<(Space, PageSet)>, MigrationError> {
        self.inbound.needs(self.images.clone(), present).await
    }

    async fn restore(
        &mut self,
        present: Vec<(Space, PageSet)>,
        wanted: Option<UnboundedSender<Wanted>>,
    ) -> std::result::Result<Restored, MigrationError> {
        let remembered = self.remembered.take();
        let spec = self.revival.context.spec();
        let spec = spec.map_err(|error| MigrationError::runtime("restore", error.sentence()))?;
        let of_its_own = netns::is_made_by_runtime(&spec);
        let shared = pages::shares_network(&self.images)
            .map_err(|error| MigrationError::runtime("restore", chain(&error)))?;
        if of_its_own && shared && self.network.is_none() {
            let what = "the images are for a network namespace that was made before";
            return Err(MigrationError::runtime("restore", what));
        }
        let mut served = Served::default();
        if !present.is_empty() {
            let takes_files = self.held()?.conversation()?.takes_descriptors();
            served = self.inbound.serve(present, wanted, takes_files).await?;
        }
        let Served { restored, files } = served;
        let mounts = self.tmpfs.make(&self.images).await?;
        let held = self.held()?;
        held.conversation()?.amend(|request| {
            mounts.amend(request);
            if let Some(remembered) = remembered {
                remembered.apply(request);
            }
            if restored.lazy {
                request.lazy_pages(true);
            }
            request.inherit(files);
            request.log_level(LOG_LEVEL);
        });
        held.bring_for_migration(of_its_own && !shared).await?;
        if let Some(pid) = self.held()?.restored() {
            self.inbound.restored(pid)?;
        }
        Ok(restored)
    }

    async fn resume(&mut self) -> std::result::Result<u32, MigrationError> {
        // Kept until all is well: whatever fails here, `discard` must find the
        // processes, which an OCI runtime that failed may not know.
        self.inbound.is_sound()?;
        self.held()?.finish("restore").await?;
        self.held = None;
        self.inbound.resumed();
        let pid = self.revival.pid();
        let pid = pid.map_err(|error| MigrationError::runtime("resume", error.sentence()))?;
        u32::try_from(pid).map_err(|_| MigrationError::runtime("resume", "a pid that is none"))
    }

    fn filled(&mut self) -> Option<BoxFuture<'static, Filled>> {
        self.inbound.filled()
    }

    async fn discard(&mut self) -> std::result::Result<(), MigrationError> {
        self.tmpfs.dismiss().await;
        if let Some(held) = self.held.take() {
            held.abandon().await?;
        }
        // Only now that nobody is there any more.
        self.inbound.stop()();
        self.tmpfs.remove().await;
        let context = &self.revival.context;
        let deleted = context.oci.delete(context.id(), true).await;
        deleted.map_err(|error| MigrationError::runtime("discard", error.sentence()))
    }

    fn journal(&self, manifest: &Manifest) -> std::result::Result<Journal, MigrationError> {
        let key = &self.revival.context.key;
        let subject = Subject {
            role: Role::Target,
            migration: meant(manifest, key, self.migration.as_ref())?,
            ticket: self.ticket.clone(),
            namespace: key.namespace().into(),
            container: key.id().into(),
            peer: self.peer.clone(),
            epoch: Epoch(manifest.epoch),
        };
        Journal::create(&paths::journal_dir(), subject)
    }
}

/// What the source says is to arrive must be what the agent made the ticket
/// for. A peer that has a ticket for one container gets no other one in, and
/// puts no record under the name of another migration.
fn meant(
    manifest: &Manifest,
    key: &ContainerKey,
    migration: Option<&MigrationId>,
) -> std::result::Result<MigrationId, MigrationError> {
    let named = manifest.migration.parse()?;
    let what = if manifest.container != key.id() {
        let container: String = manifest.container.chars().take(80).collect();
        format!("container {container} under the ticket of {}", key.id())
    } else if migration != Some(&named) {
        format!("migration {named} under the ticket of another one")
    } else {
        return Ok(named);
    };
    Err(MigrationError::Malformed { what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_for_one_container_and_one_migration() {
        let key = ContainerKey::new("default", "redis").unwrap();
        let [ours, theirs] = [[1; 16], [2; 16]].map(MigrationId::from_random);
        let manifest = |container: &str, migration: &str| Manifest {
            container: container.into(),
            migration: migration.into(),
            ..Default::default()
        };
        let good = manifest("redis", ours.as_str());
        assert_eq!(meant(&good, &key, Some(&ours)).unwrap(), ours);
        for (manifest, why) in [
            (manifest("postgres", ours.as_str()), "container postgres"),
            (manifest("redis", theirs.as_str()), "under the ticket of another one"),
            (manifest("redis", "../journal"), "32 hex digits"),
        ] {
            let error = chain(&meant(&manifest, &key, Some(&ours)).unwrap_err());
            assert!(error.contains(why), "{error}");
        }
        assert!(meant(&good, &key, None).is_err(), "a ticket for nothing lets nothing in");
    }
}
