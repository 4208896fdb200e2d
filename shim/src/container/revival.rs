//! What a checkpoint writes and a restore needs.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::process::Command;

use super::Context;
use crate::{
    error::Result,
    oci::{self, Kind},
    options::CheckpointOptions,
    stdio::Prepared,
};

/// A checkpoint to be made.
#[derive(Debug, Clone)]
pub struct Dump {
    /// What the client wants; `exit` is decided already.
    pub options: CheckpointOptions,
    /// Directory for the images; made by the checkpoint.
    pub images: PathBuf,
    /// Directory for CRIU's files and logs; made by the checkpoint and kept
    /// until Delete.
    pub work: PathBuf,
}

/// A container that is about to come back to life.
pub struct Revival {
    pub context: Arc<Context>,
    /// Its ends are the container's stdio; connected by the owner afterwards.
    pub stdio: Prepared,
}

impl Revival {
    /// The OCI runtime's `restore` of `images`, detached, with pid file and
    /// stdio. Add environment and options, then the [`id`](Self::id); run it
    /// with `oci.finish` or by hand, then read [`pid`](Self::pid).
    pub fn command(&self, images: &Path, work: &Path) -> Result<Command> {
        let context = &self.context;
        let mut command = context.oci.command("restore");
        command.arg("--detach").arg("--bundle").arg(&context.bundle);
        command.arg("--pid-file").arg(context.pid_file());
        command.arg("--image-path").arg(images).arg("--work-path").arg(work);
        // crun knows neither: it never is a subreaper, and decides by itself.
        if context.oci.kind() == Kind::Runc {
            command.arg("--no-subreaper");
            if context.options.no_pivot_root {
                command.arg("--no-pivot");
            }
        }
        self.stdio.attach(&mut command)?;
        Ok(command)
    }

    pub fn id(&self) -> &str {
        self.context.id()
    }

    /// The first process, once the runtime's `restore` has succeeded.
    pub fn pid(&self) -> Result<i32> {
        oci::read_pid(&self.context.pid_file())
    }
}
