//! containerd's task service itself: `ctr` cannot say how a checkpoint is to
//! be made, nor where a restore's images are.

use std::path::Path;

use anyhow::Result;
use containerd_client::{
    services::v1::{
        CheckpointTaskRequest, CreateTaskRequest, ResizePtyRequest, StartRequest, WaitRequest,
        snapshots::{MountsRequest, snapshots_client::SnapshotsClient},
        tasks_client::TasksClient,
    },
    tonic::{Request, transport::Channel},
};
use containerd_shim_protos::{
    protobuf::Message,
    shim::oci::{CheckpointOptions, Options},
};
use prost_types::Any;
use transship_integration::{Node, daemon::SOCKET};

pub struct Api {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
}

impl Api {
    pub fn of(node: &Node) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let path = node.path(SOCKET);
        let channel = runtime.block_on(containerd_client::connect(path))?;
        Ok(Self { runtime, channel })
    }

    fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone())
    }

    pub fn checkpoint(&self, id: &str, options: &CheckpointOptions) -> Result<()> {
        let options = Any {
            type_url: "containerd.runc.v1.CheckpointOptions".into(),
            value: options.write_to_bytes()?,
        };
        let request = CheckpointTaskRequest {
            container_id: id.into(),
            options: Some(options),
            ..Default::default()
        };
        self.runtime.block_on(self.tasks().checkpoint(ours(request)))?;
        Ok(())
    }

    /// Checkpoints without a word on how.
    pub fn checkpoint_as_you_like(&self, id: &str) -> Result<()> {
        let request = CheckpointTaskRequest { container_id: id.into(), ..Default::default() };
        self.runtime.block_on(self.tasks().checkpoint(ours(request)))?;
        Ok(())
    }

    /// A task for the container, out of `images` if there are any; answers
    /// its pid before Start, which must be 0 then.
    pub fn create(
        &self,
        id: &str,
        images: Option<&Path>,
        output: Option<&Path>,
        terminal: bool,
    ) -> Result<u32> {
        self.create_with(id, images, output, terminal, "")
    }

    /// The same under the OCI runtime `binary`.
    pub fn create_with(
        &self,
        id: &str,
        images: Option<&Path>,
        output: Option<&Path>,
        terminal: bool,
        binary: &str,
    ) -> Result<u32> {
        let mut snapshots = SnapshotsClient::new(self.channel.clone());
        let key = MountsRequest { snapshotter: "overlayfs".into(), key: id.into() };
        let rootfs = self.runtime.block_on(snapshots.mounts(ours(key)))?.into_inner().mounts;
        let options = Options {
            binary_name: binary.into(),
            criu_image_path: images.map(|path| path.display().to_string()).unwrap_or_default(),
            ..Default::default()
        };
        let request = CreateTaskRequest {
            container_id: id.into(),
            rootfs,
            stdout: output.map(|path| format!("file://{}", path.display())).unwrap_or_default(),
            terminal,
            options: Some(Any {
                type_url: "containerd.runc.v1.Options".into(),
                value: options.write_to_bytes()?,
            }),
            ..Default::default()
        };
        let created = self.runtime.block_on(self.tasks().create(ours(request)))?;
        Ok(created.into_inner().pid)
    }

    /// Answers the pid.
    pub fn start(&self, id: &str) -> Result<u32> {
        let request = StartRequest { container_id: id.into(), ..Default::default() };
        Ok(self.runtime.block_on(self.tasks().start(ours(request)))?.into_inner().pid)
    }

    /// Waits for the end; answers the exit status.
    pub fn wait(&self, id: &str) -> Result<u32> {
        let request = WaitRequest { container_id: id.into(), ..Default::default() };
        Ok(self.runtime.block_on(self.tasks().wait(ours(request)))?.into_inner().exit_status)
    }

    pub fn resize(&self, id: &str, width: u32, height: u32) -> Result<()> {
        let request =
            ResizePtyRequest { container_id: id.into(), width, height, ..Default::default() };
        self.runtime.block_on(self.tasks().resize_pty(ours(request)))?;
        Ok(())
    }
}

fn ours<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let namespace = "default".parse().unwrap_or_else(|_| unreachable!("ASCII"));
    request.metadata_mut().insert("containerd-namespace", namespace);
    request
}
