//! What containerd knows about containers.

use containerd_client::{
    services::v1::{
        Container, GetContainerRequest, ListContainersRequest,
        snapshots::{Info as SnapshotInfo, StatSnapshotRequest},
    },
    tonic::Streaming,
};
use transship_api::session;
use transship_types::{Code, ContainerKey, RUNTIME, RUNTIME_AS_RUNC};

use super::{Containerd, ContainerdError, LOOK_UP, Object, Result, Scope, image::Image};
use crate::daemon::{Description, Listed};

impl Containerd {
    pub(super) async fn container(&self, key: &ContainerKey) -> Result<Container> {
        let request = GetContainerRequest { id: key.id().to_owned() };
        let request = Scope::of(key.namespace())?.request(request);
        let doing = Object::Container(key.clone()).doing("look up");
        let answer = self.ask(doing, LOOK_UP, self.containers().get(request)).await?;
        Ok(answer.container.unwrap_or_default())
    }

    pub(super) async fn snapshot(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
    ) -> Result<SnapshotInfo> {
        let request =
            StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let request = Scope::of(namespace)?.request(request);
        let doing = Object::Snapshot(format!("{key} of {snapshotter}")).doing("look up");
        let answer = self.ask(doing, LOOK_UP, self.snapshots().stat(request)).await?;
        Ok(answer.info.unwrap_or_default())
    }

    pub(super) async fn description(&self, key: &ContainerKey) -> Result<Description> {
        let container = self.container(key).await?;
        let task = self.task_state(key).await?;
        let snapshot_key = container.snapshot_key.clone();
        Ok(Description { record: to_session(container), snapshot_key, task })
    }

    /// Containers whose runtime is ours, under either of its names.
    pub(super) async fn ours_in(&self, namespace: &str) -> Result<Vec<Listed>> {
        let filters =
            [RUNTIME, RUNTIME_AS_RUNC].map(|name| format!("runtime.name==\"{name}\"")).to_vec();
        let request = Scope::of(namespace)?.request(ListContainersRequest { filters });
        // A stream, because hundreds of specs exceed what fits one message.
        let doing = Object::Namespace(namespace.to_owned()).doing("list the containers of");
        let mut stream: Streaming<_> =
            self.ask(doing.clone(), LOOK_UP, self.containers().list_stream(request)).await?;
        let mut listed = Vec::new();
        while let Some(message) =
            stream.message().await.map_err(|status| self.failed(doing.clone(), &status))?
        {
            let container = message.container.unwrap_or_default();
            let Ok(key) = ContainerKey::new(namespace, &container.id) else { continue };
            let task = self.task_state(&key).await?;
            listed.push(Listed { key, image: container.image, task });
        }
        Ok(listed)
    }

    /// The image that the container's file system lies on.
    ///
    /// Its name may stand for something else by now, or for several platforms;
    /// what counts is the parent of its snapshot.
    pub(super) async fn origin(&self, key: &ContainerKey) -> Result<Image> {
        let container = self.container(key).await?;
        let no_image = |why: &str| {
            let reason = format!("container {key} was not made from an image: {why}");
            let remedy = "only containers made from an image can be moved";
            ContainerdError::unfit(Code::Image, reason, remedy)
        };
        if container.snapshot_key.is_empty() {
            return Err(no_image("its root file system is a directory of this host"));
        }
        if container.image.is_empty() {
            return Err(no_image("its record names none"));
        }
        let (namespace, name) = (key.namespace(), &container.image);
        let snapshot =
            self.snapshot(namespace, &container.snapshotter, &container.snapshot_key).await?;
        let images = self.images_named(namespace, name).await?;
        let lies_on =
            |image: &Image| image.chain_id().is_some_and(|chain| chain.as_str() == snapshot.parent);
        images.into_iter().find(lies_on).ok_or_else(|| {
            let reason = format!("image {name} is not what container {key} was made from");
            let remedy = format!("pull or tag as {name} the version that the container uses");
            ContainerdError::unfit(Code::Image, reason, remedy)
        })
    }

    /// What bears this name already, in words.
    pub(super) async fn name_taken_by(
        &self,
        key: &ContainerKey,
        snapshotter: &str,
    ) -> Result<Option<String>> {
        match self.container(key).await {
            Ok(_) => return Ok(Some("a container".to_owned())),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        match self.snapshot(key.namespace(), snapshotter, key.id()).await {
            Ok(_) => Ok(Some(format!("a snapshot of {snapshotter}"))),
            Err(error) if error.is_not_found() => Ok(None),
            // No such snapshotter: nothing can be in it.
            Err(error) if error.grpc() == Some(tonic::Code::InvalidArgument) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn to_session(container: Container) -> session::Container {
    let runtime = container.runtime.unwrap_or_default();
    session::Container {
        image: container.image,
        labels: container.labels,
        runtime: runtime.name,
        options: runtime.options.map(any_to_session),
        spec: container.spec.map(any_to_session),
        snapshotter: container.snapshotter,
        extensions: container
            .extensions
            .into_iter()
            .map(|(name, any)| (name, any_to_session(any)))
            .collect(),
    }
}

fn any_to_session(any: prost_types::Any) -> session::Any {
    session::Any { type_url: any.type_url, value: any.value.into() }
}

pub(super) fn any_from_session(any: &session::Any) -> prost_types::Any {
    prost_types::Any { type_url: any.type_url.clone(), value: any.value.to_vec() }
}
