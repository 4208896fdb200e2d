//! Log drivers: a program that reads stdout and stderr of a container on
//! descriptors 3 and 4 and says on 5 when it is ready (containerd's
//! `binary://` protocol).

use std::{
    os::fd::OwnedFd,
    process::{Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{io::AsyncReadExt, net::unix::pipe, process::Child, time::timeout};
use tracing::warn;
use transship_types::ContainerKey;

use super::uri::LoggerCommand;
use crate::{
    error::{Error, Result},
    sys,
};

/// A driver may have to reach a log server first.
const READY: Duration = Duration::from_secs(60);
/// To write out what it still has, after the end of its input.
const FLUSH: Duration = Duration::from_secs(2);
/// After SIGTERM; containerd's own shim waits as long.
const TERM: Duration = Duration::from_secs(12);

pub struct Logger(Child);

impl Logger {
    /// Starts the driver and waits until it is ready.
    pub async fn run(
        key: &ContainerKey,
        logger: &LoggerCommand,
        stdout: OwnedFd,
        stderr: OwnedFd,
    ) -> Result<Self> {
        let name = logger.program.display().to_string();
        let doing = |what: &str| format!("{what} the log driver {name}");
        let (ready, says_ready) = super::pipe()?;
        let mut command = Command::new(&logger.program);
        command
            .args(&logger.arguments)
            .env_clear()
            .env("CONTAINER_ID", key.id())
            .env("CONTAINER_NAMESPACE", key.namespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        sys::pass_descriptors(&mut command, vec![stdout, stderr, says_ready])
            .map_err(Error::io(doing("prepare the descriptors of")))?;
        let mut command = tokio::process::Command::from(command);
        let child = command.spawn().map_err(Error::io(doing("start")))?;
        // Our copies of its descriptors go with the command: without that its
        // death would not end `ready`.
        drop(command);
        let mut ready =
            pipe::Receiver::from_owned_fd(ready).map_err(Error::io(doing("wait for")))?;
        // It writes a byte or closes; both mean ready.
        match timeout(READY, ready.read(&mut [0])).await {
            Ok(read) => read.map_err(Error::io(doing("wait for")))?,
            Err(_) => {
                return Err(Error::Internal(format!("{} (not ready in time)", doing("start"))));
            }
        };
        Ok(Self(child))
    }

    /// Its input has ended: waits for it, with SIGTERM and SIGKILL if needed.
    pub async fn end(mut self) {
        if timeout(FLUSH, self.0.wait()).await.is_ok() {
            return;
        }
        if let Some(pid) = self.0.id() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
        }
        if timeout(TERM, self.0.wait()).await.is_err() {
            warn!("the log driver does not end, killed");
            let _ = self.0.kill().await;
        }
    }
}
