//! A restore: the OCI runtime's own, with CRIU at the gate.
//!
//! No daemon can say at a restore what the checkpoint was made with, so that
//! was left beside the images and is put into CRIU's request here.

use std::{
    fs,
    io::{self, PipeReader, PipeWriter},
    path::Path,
    process::Stdio,
    sync::Arc,
};

use tokio::{net::unix::pipe, process::Command};
use tracing::warn;
use transship_criu::Remembered;
use transship_migration::chain;

use crate::{
    cgroup::Cgroup,
    checkpoint::explain,
    container::{Context, Revival},
    error::{Error, Result},
    held::Held,
    netns,
};

/// Answers the pid of the first process.
pub async fn restore(revival: &mut Revival, images: &Path) -> Result<i32> {
    let context = revival.context.clone();
    let work = context.criu_work();
    fs::create_dir_all(&work).map_err(Error::io(format!("make {}", work.display())))?;
    let remembered = Remembered::read(images)
        .map_err(Error::other(format!("restore container {}", context.id())))?;
    let fresh_network = netns::is_made_by_runtime(&context.spec()?);
    let mut command = revival.command(images, &work)?;
    stand_in(&mut command, revival, &external_descriptors(images)?)?;
    command.arg(revival.id());

    let path = work.join("restore.log");
    let failed = |error: &dyn std::error::Error| {
        let outcome = format!("container {} was not restored", context.id());
        explain("restore", outcome, error, &path)
    };
    let started = Held::start(&context.oci, command, path.clone()).await;
    let mut restoring = Restoring { context: context.clone(), held: None };
    let held = restoring.held.insert(started.map_err(|e| failed(&e))?);
    let conversation = held.conversation().map_err(|e| failed(&e))?;
    if let Some(remembered) = remembered {
        conversation.amend(|request| remembered.apply(request));
    }
    // What comes after takes moments, and `finish` allows no more.
    let brought = held.bring(fresh_network).await;
    if let Err(error) = brought {
        let told = failed(&error);
        restoring.undo().await;
        return Err(told);
    }
    let finished = held.finish("restore").await;
    if let Err(error) = finished {
        let told = failed(&error);
        restoring.undo().await;
        return Err(told);
    }
    restoring.held = None;
    let pid = revival.pid()?;
    thaw(pid);
    Ok(pid)
}

/// What runc and crun write beside the images: where the first process's
/// descriptors 0, 1 and 2 led, such as `pipe:[123]` or `/dev/null`.
pub const DESCRIPTORS: &str = "descriptors.json";

pub fn external_descriptors(images: &Path) -> Result<Vec<String>> {
    let path = images.join(DESCRIPTORS);
    let text = fs::read(&path).map_err(Error::io(format!("read {}", path.display())))?;
    serde_json::from_slice(&text)
        .map_err(Error::other(format!("{} is no list of descriptors", path.display())))
}

/// Gives a pipe wherever the container had one and this task has nothing.
///
/// The runtime gives CRIU its own stdio for the container's pipes. Where the
/// client wants no stdio that is the host's `/dev/null`: a file that no mount
/// of the container leads to, with which it could never be dumped again.
pub fn stand_in(command: &mut Command, revival: &Revival, descriptors: &[String]) -> Result<()> {
    for (number, led) in descriptors.iter().enumerate().take(3) {
        if revival.stdio.feeds(number) || !led.starts_with("pipe:") {
            continue;
        }
        let (read, write) = io::pipe().map_err(Error::io("make a pipe for the container"))?;
        match number {
            // Nobody will write: the end of input, as from /dev/null.
            0 => command.stdin(read),
            1 => command.stdout(discarded(read, write)?),
            _ => command.stderr(discarded(read, write)?),
        };
    }
    Ok(())
}

/// The end for the container; what it writes there is read and forgotten.
fn discarded(read: PipeReader, write: PipeWriter) -> Result<Stdio> {
    let mut read = pipe::Receiver::from_owned_fd(read.into())
        .map_err(Error::io("watch a pipe of the container"))?;
    // Ends with the last process that holds the other end.
    tokio::spawn(async move {
        let _ = tokio::io::copy(&mut read, &mut tokio::io::sink()).await;
    });
    Ok(write.into())
}

/// A restore under way. Dropped (the container was killed meanwhile) it still
/// undoes what the runtime has done; nobody waits for that.
struct Restoring {
    context: Arc<Context>,
    held: Option<Held>,
}

impl Restoring {
    async fn undo(&mut self) {
        if let Some(held) = self.held.take() {
            undo(self.context.clone(), held).await;
        }
    }
}

impl Drop for Restoring {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            tokio::spawn(undo(self.context.clone(), held));
        }
    }
}

/// CRIU kills what it has restored once its socket is closed; the runtime
/// then removes what it has made. One that could not leaves a mount.
async fn undo(context: Arc<Context>, held: Held) {
    if let Err(error) = held.abandon().await {
        warn!(error = chain(&error), "CRIU did not undo its restore well");
    }
    if let Err(error) = context.oci.unmount_restore(context.id()).await {
        warn!(error = error.sentence(), "the restore's mount is still there");
    }
}

/// A client of containerd pauses before it checkpoints, and CRIU puts a
/// freezer back as it found it. But Start means: running.
fn thaw(pid: i32) {
    let thawed = Cgroup::of_process(pid).and_then(|cgroup| match cgroup.is_frozen()? {
        true => cgroup.thaw(),
        false => Ok(()),
    });
    if let Err(error) = thawed {
        warn!(pid, error = error.sentence(), "it may stand still in its freezer");
    }
}
