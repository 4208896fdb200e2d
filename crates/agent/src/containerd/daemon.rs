//! containerd as the rest of the agent sees it.

use std::{future::Future, pin::Pin};

use async_trait::async_trait;
use bytes::Bytes;
use transship_api::session::Descriptor;
use transship_types::{Code, ContainerKey};

use super::{
    Containerd, ContainerdArrival, ContainerdError, Result,
    blob::{Blob, Digest},
    content::{Reader, Writer},
};
use crate::daemon::{
    Arrival, Arriving, BlobReader, BlobWriter, Daemon, DaemonError, Description, Listed, Task,
};

type Answer<T> = std::result::Result<T, DaemonError>;

#[async_trait]
impl Daemon for Containerd {
    async fn version(&self) -> Answer<String> {
        let version = self.daemon_version().await?;
        Ok(format!("containerd {}", version.trim_start_matches('v')))
    }

    async fn describe(&self, key: &ContainerKey) -> Answer<Description> {
        Ok(self.description(key).await?)
    }

    async fn list(&self, namespace: Option<&str>) -> Answer<Vec<Listed>> {
        let namespaces = match namespace {
            Some(namespace) => vec![namespace.to_owned()],
            None => self.namespace_names().await?,
        };
        let mut listed = Vec::new();
        for namespace in namespaces {
            listed.extend(self.ours_in(&namespace).await?);
        }
        Ok(listed)
    }

    async fn task(&self, key: &ContainerKey) -> Answer<Option<Task>> {
        Ok(self.task_state(key).await?)
    }

    async fn taken(&self, key: &ContainerKey, snapshotter: &str) -> Answer<Option<String>> {
        Ok(self.name_taken_by(key, snapshotter).await?)
    }

    async fn has_snapshotter(&self, name: &str) -> Answer<bool> {
        Ok(self.snapshotters().await?.iter().any(|known| known == name))
    }

    async fn content_of(&self, namespace: &str, image: &str) -> Answer<Vec<Descriptor>> {
        let images = self.images_named(namespace, image).await?;
        match images.first() {
            Some(image) => Ok(self.descriptors(namespace, image).await?),
            None => Ok(Vec::new()),
        }
    }

    async fn origin_of(&self, key: &ContainerKey) -> Answer<Vec<Descriptor>> {
        let image = self.origin(key).await?;
        Ok(self.descriptors(key.namespace(), &image).await?)
    }

    async fn missing(&self, namespace: &str, content: &[Descriptor]) -> Answer<Vec<String>> {
        let blobs: Result<Vec<Blob>> =
            content.iter().map(|from| Ok(Blob::try_from(from)?)).collect();
        let missing = self.missing_blobs(namespace, &blobs?).await?;
        Ok(missing.iter().map(Digest::to_string).collect())
    }

    async fn read_blob(
        &self,
        namespace: &str,
        descriptor: &Descriptor,
    ) -> Answer<Box<dyn BlobReader>> {
        let blob = Blob::try_from(descriptor).map_err(ContainerdError::from)?;
        Ok(Box::new(self.read_content(namespace, &blob).await?))
    }

    async fn free_disk(&self) -> Answer<u64> {
        Ok(self.free_disk_bytes().await?)
    }

    async fn arrival(&self, key: &ContainerKey) -> Answer<Box<dyn Arriving>> {
        Ok(Box::new(self.open_arrival(key).await?))
    }

    async fn unfinished(&self) -> Answer<Vec<(ContainerKey, Box<dyn Arriving>)>> {
        let leases = self.unfinished_leases().await?.into_iter();
        Ok(leases
            .map(|lease| {
                let key = lease.key.clone();
                let arrival = ContainerdArrival::under(lease, self.clone());
                (key, Box::new(arrival) as Box<dyn Arriving>)
            })
            .collect())
    }

    async fn remove(&self, key: &ContainerKey) -> Answer<()> {
        Ok(self.remove_container(key).await?)
    }

    async fn end(&self, key: &ContainerKey, made_by: i64) -> Answer<bool> {
        Ok(self.end_container(key, made_by).await?)
    }
}

#[async_trait]
impl Arriving for ContainerdArrival {
    async fn blob(&mut self, descriptor: &Descriptor) -> Answer<Box<dyn BlobWriter>> {
        Ok(Box::new(self.daemon.write_content(&self.lease, descriptor).await?))
    }

    async fn create(&mut self, arrival: &Arrival) -> Answer<()> {
        Ok(self.make(arrival).await?)
    }

    fn start(&self) -> Pin<Box<dyn Future<Output = Answer<u32>> + Send>> {
        let (daemon, key) = (self.daemon.clone(), self.lease.key.clone());
        Box::pin(async move { Ok(daemon.start_task(&key).await?) })
    }

    async fn keep(self: Box<Self>) -> Answer<()> {
        Ok(self.settle().await?)
    }

    async fn undo(self: Box<Self>) -> Answer<()> {
        Ok(self.unmake().await?)
    }
}

#[async_trait]
impl BlobReader for Reader {
    async fn next(&mut self) -> Answer<Option<Bytes>> {
        Ok(self.next_bytes().await?)
    }
}

#[async_trait]
impl BlobWriter for Writer {
    async fn write(&mut self, bytes: Bytes) -> Answer<()> {
        Ok(self.write_bytes(bytes).await?)
    }

    async fn commit(self: Box<Self>) -> Answer<()> {
        Ok(self.finish().await?)
    }
}

impl From<ContainerdError> for DaemonError {
    fn from(error: ContainerdError) -> Self {
        match error {
            ContainerdError::Silent { socket, source } => DaemonError::Unavailable {
                address: format!("containerd at {}", socket.display()),
                source: Box::new(source),
            },
            ContainerdError::Refused { ref doing, .. } => match error.code() {
                Code::UnknownContainer => DaemonError::NotFound { what: doing.object.to_string() },
                Code::NameTaken => DaemonError::Exists { what: doing.object.to_string() },
                _ => DaemonError::Refused(Box::new(error.refusal())),
            },
            other => DaemonError::Refused(Box::new(other.refusal())),
        }
    }
}
