//! A container on its way in, from its lease to its task.

use std::{collections::HashSet, fs::File, path::PathBuf, time::Duration};

use containerd_client::{
    services::v1::{
        Container, CreateContainerRequest, CreateImageRequest, CreateTaskRequest, Image as Record,
        container::Runtime, snapshots::PrepareSnapshotRequest,
    },
    types::{Descriptor, Mount},
};
use transship_api::session;
use transship_types::{Code, ContainerKey};

use super::{
    CHANGE, Containerd, ContainerdError, Object, Result, Scope,
    blob::{Blob, Digest},
    image::{Image, lacking_labels},
    inspect::any_from_session,
    lease::Lease,
    spec::Spec,
    stdio,
};
use crate::daemon::Arrival;

/// The shim starts and mounts the root; an OCI runtime may already come up.
const CREATES_WITHIN: Duration = Duration::from_secs(120);

/// An arrival in containerd. It is recorded there, by its lease: dropping
/// this changes nothing.
pub struct ContainerdArrival {
    pub(super) daemon: Containerd,
    pub(super) lease: Lease,
    /// Our ends of the task's outputs, as long as it is arriving.
    outputs: Vec<File>,
}

impl ContainerdArrival {
    pub(super) fn under(lease: Lease, daemon: Containerd) -> Self {
        Self { daemon, lease, outputs: Vec::new() }
    }

    /// Everything up to the task. After an error what was made so far is
    /// still there, for `undo`.
    pub(super) async fn make(&mut self, arrival: &Arrival) -> Result<()> {
        let Arrival { key, record, .. } = arrival;
        if *key != self.lease.key {
            let reason = format!("the arrival of {} was asked to make {key}", self.lease.key);
            return Err(ContainerdError::unfit(Code::Internal, reason, ""));
        }
        let spec = marked_spec(arrival)?;
        let image = self.image(arrival).await?;
        self.tie_together(&image).await?;
        let image_name = self.record_image(&image).await?;
        let top = self.daemon.unpack(&self.lease, &record.snapshotter, &image).await?;
        let rootfs = self.prepare_root(&record.snapshotter, &top).await?;
        self.record_container(record, image_name, spec).await?;
        let stdio = self.make_stdio(&arrival.stdio)?;
        self.create_task(rootfs, stdio).await
    }

    /// The image among what the source offered. All of it is held from here on.
    async fn image(&self, arrival: &Arrival) -> Result<Image> {
        let Arrival { key, record, content, .. } = arrival;
        let Some(top) = content.first() else {
            let reason = format!("container {key} was not made from an image");
            let remedy = "only containers made from an image can be moved";
            return Err(ContainerdError::unfit(Code::Image, reason, remedy));
        };
        let mut offered = HashSet::new();
        for descriptor in content {
            let blob = Blob::try_from(descriptor)?;
            if !self.daemon.take_in(&self.lease, &blob).await? {
                let reason = format!("blob {} has not come", blob.digest);
                return Err(ContainerdError::unfit(Code::Image, reason, "migrate again"));
            }
            offered.insert(blob.digest);
        }
        // An index that was here before may offer more than the source meant.
        let meant = |image: &Image| image.blobs().all(|blob| offered.contains(&blob.digest));
        let namespace = key.namespace();
        let images =
            self.daemon.images_under(namespace, &record.image, Blob::try_from(top)?).await?;
        images.into_iter().find(meant).ok_or_else(|| {
            let reason = format!("what came for image {} is not all of it", record.image);
            ContainerdError::malformed(reason)
        })
    }

    /// Labels that let the garbage collector find the way from the image
    /// record down to the layers.
    async fn tie_together(&self, image: &Image) -> Result<()> {
        let namespace = self.lease.key.namespace();
        for (parent, children) in image.references() {
            let info = self.daemon.blob_info(namespace, &parent.digest).await?;
            let lacking = lacking_labels(&info.unwrap_or_default().labels, &children);
            self.daemon.label_blob(namespace, &parent.digest, lacking).await?;
        }
        Ok(())
    }

    /// An image record under the source's name, or, where that name already
    /// stands for something else here, under one made of its digest: a
    /// migration must not move a user's tag. Returns the name used.
    async fn record_image(&self, image: &Image) -> Result<String> {
        let Some(top) = image.path.first() else {
            return Err(ContainerdError::malformed("an image without a top"));
        };
        let namespace = self.lease.key.namespace();
        for name in [image.name.clone(), name_by_digest(&top.digest)] {
            match self.create_image(&name, top).await {
                Ok(()) => return Ok(name),
                Err(error) if error.is_already_exists() => {}
                Err(error) => return Err(error),
            }
            let present = self.daemon.image_record(namespace, &name).await?;
            if present.and_then(|p| p.target).is_some_and(|t| t.digest == top.digest.as_str()) {
                return Ok(name);
            }
        }
        let reason = format!("image {} has another content on the target", image.name);
        let remedy = "remove that image, or tag it otherwise, on the target";
        Err(ContainerdError::unfit(Code::NameTaken, reason, remedy))
    }

    async fn create_image(&self, name: &str, top: &Blob) -> Result<()> {
        let target = Descriptor {
            media_type: top.media_type.clone(),
            digest: top.digest.to_string(),
            size: i64::try_from(top.size).unwrap_or(i64::MAX),
            ..Default::default()
        };
        let record = Record {
            name: name.to_owned(),
            labels: [self.lease.mark()].into(),
            target: Some(target),
            ..Default::default()
        };
        let request = CreateImageRequest { image: Some(record), ..Default::default() };
        let request = Scope::under(&self.lease)?.request(request);
        let doing = Object::Image(name.to_owned()).doing("create");
        self.daemon.ask(doing, CHANGE, self.daemon.images().create(request)).await?;
        Ok(())
    }

    /// The writable layer, and how to mount it.
    async fn prepare_root(&self, snapshotter: &str, top: &Digest) -> Result<Vec<Mount>> {
        let id = self.lease.key.id();
        let request = PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: id.to_owned(),
            parent: top.to_string(),
            labels: [self.lease.mark()].into(),
        };
        let request = Scope::under(&self.lease)?.request(request);
        let doing = Object::Snapshot(format!("{id} of {snapshotter}")).doing("prepare");
        let answer =
            self.daemon.ask(doing, CHANGE, self.daemon.snapshots().prepare(request)).await?;
        Ok(answer.mounts)
    }

    async fn record_container(
        &self,
        record: &session::Container,
        image: String,
        spec: prost_types::Any,
    ) -> Result<()> {
        let id = self.lease.key.id();
        let mut labels = record.labels.clone();
        labels.extend([self.lease.mark()]);
        let container = Container {
            id: id.to_owned(),
            labels,
            image,
            runtime: Some(Runtime {
                name: record.runtime.clone(),
                options: record.options.as_ref().map(any_from_session),
            }),
            spec: Some(spec),
            snapshotter: record.snapshotter.clone(),
            snapshot_key: id.to_owned(),
            extensions: record
                .extensions
                .iter()
                .map(|(name, any)| (name.clone(), any_from_session(any)))
                .collect(),
            ..Default::default()
        };
        let request = CreateContainerRequest { container: Some(container) };
        let request = Scope::under(&self.lease)?.request(request);
        let doing = Object::Container(self.lease.key.clone()).doing("create");
        self.daemon.ask(doing, CHANGE, self.daemon.containers().create(request)).await?;
        Ok(())
    }

    fn make_stdio(&mut self, source: &session::Stdio) -> Result<session::Stdio> {
        let directory = self.stdio_directory();
        let (stdio, fifos) = stdio::arrange(source, &directory, self.lease.key.id());
        stdio::make(&self.daemon.fifos, &directory, &fifos)?;
        self.outputs = stdio::open_outputs(&stdio, &fifos)?;
        Ok(stdio)
    }

    pub(super) fn stdio_directory(&self) -> PathBuf {
        stdio::directory(&self.daemon.fifos, &self.lease.key)
    }

    async fn create_task(&self, rootfs: Vec<Mount>, stdio: session::Stdio) -> Result<()> {
        let request = CreateTaskRequest {
            container_id: self.lease.key.id().to_owned(),
            rootfs,
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            ..Default::default()
        };
        let request = Scope::under(&self.lease)?.request(request);
        let doing = Object::Task(self.lease.key.clone()).doing("create");
        self.daemon.ask(doing, CREATES_WITHIN, self.daemon.tasks().create(request)).await?;
        Ok(())
    }
}

/// The spec with the ticket that makes our shim's Start an arrival.
fn marked_spec(arrival: &Arrival) -> Result<prost_types::Any> {
    let Some(any) = &arrival.record.spec else {
        let reason = format!("container {} came without a spec", arrival.key);
        return Err(ContainerdError::malformed(reason));
    };
    let mut spec = Spec::read(&any.value, &arrival.key)?;
    spec.set_ticket(Some(&arrival.ticket));
    Ok(prost_types::Any { type_url: any.type_url.clone(), value: spec.write() })
}

/// A valid reference for any client, which nobody's registry can serve.
fn name_by_digest(digest: &Digest) -> String {
    format!("transship.internal/image@{digest}")
}

impl Containerd {
    pub(super) async fn open_arrival(&self, key: &ContainerKey) -> Result<ContainerdArrival> {
        let lease = self.create_lease(key).await?;
        Ok(ContainerdArrival::under(lease, self.clone()))
    }
}
