//! The two ends of an arrival: everything of it stays, or nothing.

use containerd_client::services::v1::{
    Container, DeleteImageRequest, Image as Record, ListImagesRequest, UpdateContainerRequest,
    UpdateImageRequest,
    snapshots::{Info as SnapshotInfo, ListSnapshotsRequest, UpdateSnapshotRequest},
};
use prost_types::FieldMask;
use transship_types::Code;

use super::{
    CHANGE, ContainerdArrival, ContainerdError, LOOK_UP, Object, Result, Scope,
    lease::{MARK, absent_is_fine},
    spec::Spec,
    stdio,
};
use crate::daemon::TaskStatus;

impl ContainerdArrival {
    /// It has arrived: the marks go, the lease goes, all else stays. From here
    /// on an undo finds nothing of its own.
    pub(super) async fn settle(&self) -> Result<()> {
        if let Some(container) = self.own_container().await? {
            self.unmark_container(container).await?;
        }
        for (snapshotter, info) in self.own_snapshots().await? {
            self.unmark_snapshot(snapshotter, info).await?;
        }
        for image in self.own_images().await? {
            self.unmark_image(image).await?;
        }
        self.daemon.delete_lease(&self.lease, false).await
    }

    /// Removes everything that this arrival made, in the reverse order of
    /// making, going on after an error; the first one is returned. The lease
    /// goes only when all else is gone: until then, another undo can try.
    pub(super) async fn unmake(&self) -> Result<()> {
        self.refuse_if_running().await?;
        let mut first = Ok(());
        for done in [
            self.unmake_container().await,
            self.unmake_snapshots().await,
            self.unmake_images().await,
            self.daemon.abort_ingests(&self.lease).await,
        ] {
            match (done, &first) {
                (Err(error), Ok(())) => first = Err(error),
                (Err(error), Err(_)) => tracing::warn!(%error, "undo of an arrival"),
                (Ok(()), _) => {}
            }
        }
        first?;
        self.daemon.delete_lease(&self.lease, true).await?;
        self.daemon.delete_new_namespace(&self.lease).await
    }

    /// A container that runs has arrived, whatever went wrong afterwards:
    /// its source may be gone, and this would be the only copy.
    async fn refuse_if_running(&self) -> Result<()> {
        let key = &self.lease.key;
        if self.own_container().await?.is_none() {
            return Ok(());
        }
        match self.daemon.task_state(key).await? {
            Some(task) if matches!(task.status, TaskStatus::Running | TaskStatus::Paused) => {
                let reason = format!("container {key} has arrived and runs, so it stays");
                Err(ContainerdError::unfit(Code::Busy, reason, ""))
            }
            _ => Ok(()),
        }
    }

    async fn unmake_container(&self) -> Result<()> {
        let key = &self.lease.key;
        if self.own_container().await?.is_some() {
            self.daemon.end_task(key).await?;
            stdio::remove(&self.daemon.fifos, &self.stdio_directory())?;
            self.daemon.delete_container(key).await?;
        }
        Ok(())
    }

    async fn unmake_snapshots(&self) -> Result<()> {
        for (snapshotter, info) in self.own_snapshots().await? {
            let namespace = self.lease.key.namespace();
            self.daemon.delete_snapshot(namespace, &snapshotter, &info.name).await?;
        }
        Ok(())
    }

    async fn unmake_images(&self) -> Result<()> {
        for image in self.own_images().await? {
            let doing = Object::Image(image.name.clone()).doing("delete");
            let request = DeleteImageRequest { name: image.name, ..Default::default() };
            let request = self.scope()?.request(request);
            let done = self.daemon.ask(doing, CHANGE, self.daemon.images().delete(request)).await;
            absent_is_fine(done)?;
        }
        Ok(())
    }

    async fn own_container(&self) -> Result<Option<Container>> {
        match self.daemon.container(&self.lease.key).await {
            Ok(container) => Ok(Some(container).filter(|c| self.lease.made(&c.labels))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn own_snapshots(&self) -> Result<Vec<(String, SnapshotInfo)>> {
        let mut own = Vec::new();
        for snapshotter in self.daemon.snapshotters().await? {
            let request = ListSnapshotsRequest {
                snapshotter: snapshotter.clone(),
                filters: vec![self.filter()],
            };
            let doing = Object::Containerd.doing("list the snapshots of");
            let request = self.scope()?.request(request);
            let mut client = self.daemon.snapshots();
            let mut stream = self.daemon.ask(doing.clone(), LOOK_UP, client.list(request)).await?;
            while let Some(message) = stream
                .message()
                .await
                .map_err(|status| self.daemon.failed(doing.clone(), &status))?
            {
                own.extend(message.info.into_iter().map(|info| (snapshotter.clone(), info)));
            }
        }
        Ok(own)
    }

    async fn own_images(&self) -> Result<Vec<Record>> {
        let request = self.scope()?.request(ListImagesRequest { filters: vec![self.filter()] });
        let doing =
            Object::Namespace(self.lease.key.namespace().to_owned()).doing("list the images of");
        Ok(self.daemon.ask(doing, LOOK_UP, self.daemon.images().list(request)).await?.images)
    }

    async fn unmark_container(&self, mut container: Container) -> Result<()> {
        container.labels.remove(MARK);
        if let Some(any) = &mut container.spec {
            let mut spec = Spec::read(&any.value, &self.lease.key)?;
            spec.set_ticket(None);
            any.value = spec.write();
        }
        let request = UpdateContainerRequest {
            container: Some(container),
            update_mask: Some(mask(&["labels", "spec"])),
        };
        let doing = Object::Container(self.lease.key.clone()).doing("update");
        let request = self.scope()?.request(request);
        self.daemon.ask(doing, CHANGE, self.daemon.containers().update(request)).await?;
        Ok(())
    }

    async fn unmark_snapshot(&self, snapshotter: String, mut info: SnapshotInfo) -> Result<()> {
        info.labels.remove(MARK);
        let doing = Object::Snapshot(format!("{} of {snapshotter}", info.name)).doing("update");
        let request = UpdateSnapshotRequest {
            snapshotter,
            info: Some(info),
            update_mask: Some(mask(&["labels"])),
        };
        let request = self.scope()?.request(request);
        self.daemon.ask(doing, CHANGE, self.daemon.snapshots().update(request)).await?;
        Ok(())
    }

    async fn unmark_image(&self, mut image: Record) -> Result<()> {
        image.labels.remove(MARK);
        let doing = Object::Image(image.name.clone()).doing("update");
        let request = UpdateImageRequest {
            image: Some(image),
            update_mask: Some(mask(&["labels"])),
            ..Default::default()
        };
        let request = self.scope()?.request(request);
        self.daemon.ask(doing, CHANGE, self.daemon.images().update(request)).await?;
        Ok(())
    }

    fn scope(&self) -> Result<Scope> {
        Scope::of(self.lease.key.namespace())
    }

    fn filter(&self) -> String {
        format!("labels.\"{MARK}\"==\"{}\"", self.lease.id)
    }
}

fn mask(paths: &[&str]) -> FieldMask {
    FieldMask { paths: paths.iter().map(|&path| path.to_owned()).collect() }
}
