//! From layers to snapshots: one snapshot per layer, each on the one below,
//! named by its chain id as every client of containerd names it.

use std::{collections::HashMap, time::Duration};

use containerd_client::{
    services::v1::{
        ApplyRequest,
        snapshots::{CommitSnapshotRequest, PrepareSnapshotRequest},
    },
    types::{Descriptor, Mount},
};
use transship_types::Code;

use super::{
    CHANGE, Containerd, ContainerdError, Object, Result, Scope,
    blob::{Blob, Digest},
    image::{Image, chain_ids},
    lease::Lease,
};

/// Unpacking one layer: gigabytes of small files on a slow disk.
const UNPACKS_WITHIN: Duration = Duration::from_secs(30 * 60);
/// Asks a snapshotter that can get the layer by other means (stargz, nydus)
/// whether it has it.
const REFERENCE_LABEL: &str = "containerd.io/snapshot.ref";
const UNCOMPRESSED_LABEL: &str = "containerd.io/uncompressed";

impl Containerd {
    /// Unpacks what is not unpacked yet and returns the name of the top.
    pub(super) async fn unpack(
        &self,
        lease: &Lease,
        snapshotter: &str,
        image: &Image,
    ) -> Result<Digest> {
        let namespace = lease.key.namespace();
        let chain = chain_ids(image.layers.iter().map(|(_, diff_id)| diff_id));
        let mut below = None;
        for ((layer, diff_id), id) in image.layers.iter().zip(chain) {
            self.hold(lease, format!("snapshots/{snapshotter}"), id.as_str()).await?;
            let step = Step { lease, snapshotter, id: &id, below: below.as_ref() };
            match self.snapshot(namespace, snapshotter, id.as_str()).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => {
                    self.unpack_layer(&step, layer, diff_id).await?;
                    let labels = [(UNCOMPRESSED_LABEL.to_owned(), diff_id.to_string())];
                    self.label_blob(namespace, &layer.digest, labels.into()).await?;
                }
                Err(error) => return Err(error),
            }
            below = Some(id);
        }
        let Some(top) = below else {
            let reason = format!("image {} has no layers", image.name);
            return Err(ContainerdError::unfit(Code::Image, reason, ""));
        };
        // From now on the image holds its snapshots.
        let held = (format!("containerd.io/gc.ref.snapshot.{snapshotter}"), top.to_string());
        self.label_blob(namespace, &image.config.digest, [held].into()).await?;
        Ok(top)
    }

    async fn unpack_layer(&self, step: &Step<'_>, layer: &Blob, diff_id: &Digest) -> Result<()> {
        let Some(mounts) = self.prepare_layer(step).await? else { return Ok(()) };
        let done = match self.apply(step, layer, diff_id, mounts).await {
            Ok(()) => self.commit_layer(step).await,
            failed => failed,
        };
        if done.is_err() {
            let namespace = step.lease.key.namespace();
            if let Err(error) =
                self.delete_snapshot(namespace, step.snapshotter, &step.workplace()).await
            {
                tracing::debug!(%error, "a half-unpacked layer stays until its lease ends");
            }
        }
        match done {
            // Somebody else unpacked the same layer meanwhile.
            Err(error) if error.is_already_exists() => Ok(()),
            other => other,
        }
    }

    /// None: the snapshotter has it, ready.
    async fn prepare_layer(&self, step: &Step<'_>) -> Result<Option<Vec<Mount>>> {
        let request = PrepareSnapshotRequest {
            snapshotter: step.snapshotter.to_owned(),
            key: step.workplace(),
            parent: step.below.map(Digest::to_string).unwrap_or_default(),
            labels: step.labels(),
        };
        let request = Scope::under(step.lease)?.request(request);
        let doing = step.doing("prepare");
        match self.ask(doing, CHANGE, self.snapshots().prepare(request)).await {
            Ok(answer) => Ok(Some(answer.mounts)),
            Err(error) if error.is_already_exists() => {
                let namespace = step.lease.key.namespace();
                self.snapshot(namespace, step.snapshotter, step.id.as_str()).await?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn apply(
        &self,
        step: &Step<'_>,
        layer: &Blob,
        diff_id: &Digest,
        mounts: Vec<Mount>,
    ) -> Result<()> {
        let diff = Descriptor {
            media_type: layer.media_type.clone(),
            digest: layer.digest.to_string(),
            size: i64::try_from(layer.size).unwrap_or(i64::MAX),
            annotations: HashMap::new(),
        };
        let request = ApplyRequest { diff: Some(diff), mounts, ..Default::default() };
        let request = Scope::under(step.lease)?.request(request);
        let doing = Object::Blob(layer.digest.to_string()).doing("unpack");
        let answer = self.ask(doing, UNPACKS_WITHIN, self.diff().apply(request)).await?;
        let applied = answer.applied.unwrap_or_default().digest;
        if applied == diff_id.as_str() {
            return Ok(());
        }
        let digest = &layer.digest;
        let reason = format!("layer {digest} unpacks to {applied}, and its image says {diff_id}");
        Err(ContainerdError::unfit(Code::Image, reason, "pull the image again on the source"))
    }

    async fn commit_layer(&self, step: &Step<'_>) -> Result<()> {
        let request = CommitSnapshotRequest {
            snapshotter: step.snapshotter.to_owned(),
            name: step.id.to_string(),
            key: step.workplace(),
            labels: step.labels(),
        };
        let request = Scope::under(step.lease)?.request(request);
        self.ask(step.doing("commit"), CHANGE, self.snapshots().commit(request)).await?;
        Ok(())
    }
}

/// One layer being unpacked.
struct Step<'a> {
    lease: &'a Lease,
    snapshotter: &'a str,
    id: &'a Digest,
    below: Option<&'a Digest>,
}

impl Step<'_> {
    /// The snapshot it is unpacked in. Unique to the arrival: two may unpack
    /// the same layer at once.
    fn workplace(&self) -> String {
        format!("extract-{} {}", self.lease.id, self.id)
    }

    fn labels(&self) -> HashMap<String, String> {
        HashMap::from([(REFERENCE_LABEL.to_owned(), self.id.to_string())])
    }

    fn doing(&self, verb: &'static str) -> super::Doing {
        Object::Snapshot(format!("{} of {}", self.id, self.snapshotter)).doing(verb)
    }
}
