//! A checkpoint: the OCI runtime's own, with CRIU at the gate.
//!
//! The runtime knows mounts, namespaces and cgroups. What it has no flag for
//! is added to CRIU's request, what the restore must know is left beside the
//! images, and CRIU's notifications tell when the container stands still.

use std::{fs, os::unix::fs::DirBuilderExt, path::Path};

use transship_criu::{Amendments, CriuError, Remembered, log};
use transship_migration::chain;

use crate::{
    container::{Dump, Occupation},
    error::{Error, Result},
    held::Held,
    oci::Kind,
    tree::{self, Stranger},
};

/// Deleted files that a process still has open travel inside the images; this
/// is the largest. CRIU's own default of 1 MiB is less than a log file.
const GHOST_LIMIT_BYTES: u32 = 1 << 30;

/// The first notification; the tasks still run then.
const BEFORE_FREEZE: &str = "pre-dump";

pub async fn checkpoint(dump: &Dump, occupation: &Occupation) -> Result<()> {
    let context = occupation.context();
    refuse_strangers(occupation)?;
    make_private(&dump.images)?;
    make_private(&dump.work)?;
    let options = &dump.options;
    let mut command = context.oci.command("checkpoint");
    command.arg("--image-path").arg(&dump.images).arg("--work-path").arg(&dump.work);
    if !options.exit {
        command.arg("--leave-running");
    }
    if !options.cgroups_mode.is_empty() {
        command.arg("--manage-cgroups-mode").arg(&options.cgroups_mode);
    }
    for namespace in &options.empty_namespaces {
        if context.oci.kind() == Kind::Crun {
            let text = "crun cannot leave namespaces empty; use runc for this checkpoint";
            return Err(Error::InvalidArgument(text.into()));
        }
        command.arg("--empty-ns").arg(namespace);
    }
    command.arg(context.id());

    let path = dump.work.join("dump.log");
    let failed = |error: &dyn std::error::Error| {
        let outcome = format!("container {} was not checkpointed and goes on", context.id());
        explain("checkpoint", outcome, error, &path)
    };
    let mut held =
        Held::start(&context.oci, command, path.clone()).await.map_err(|e| failed(&e))?;
    let conversation = held.conversation().map_err(|e| failed(&e))?;
    conversation.amend(|request| {
        amend(request);
        request.tcp_established(options.open_tcp);
        request.tcp_skip_in_flight(options.open_tcp);
        request.ext_unix_sk(options.external_unix_sockets);
        request.shell_job(options.terminal);
        request.file_locks(options.file_locks);
    });
    let remembered = Remembered::of_dump(conversation.options());
    let dumped = watch(&mut held, occupation).await;
    let done = match dumped {
        Ok(()) => held.finish("checkpoint").await.map_err(|e| failed(&e)),
        Err(error) => {
            let told = failed(&error);
            if let Err(error) = held.abandon().await {
                tracing::warn!(error = chain(&error), "CRIU did not undo its dump well");
            }
            Err(told)
        }
    };
    let done = done.and_then(|()| {
        let written = remembered.write(&dump.images);
        written.map_err(Error::other(format!("checkpoint container {}", context.id())))
    });
    if done.is_err() || !options.exit {
        occupation.thawed().await?;
    }
    done
}

/// From the release of CRIU to its last notification, with the container's
/// state told on the way.
async fn watch(held: &mut Held, occupation: &Occupation) -> std::result::Result<(), CriuError> {
    let Ok(conversation) = held.conversation() else { return Ok(()) };
    conversation.release().await?;
    let mut frozen = false;
    while let Some(notified) = conversation.next().await? {
        if !frozen && notified.script != BEFORE_FREEZE {
            // The owner is there as long as this job is; if not, nobody asks.
            frozen = occupation.frozen().await.is_ok();
        }
        if notified.script == "post-dump" {
            break;
        }
    }
    Ok(())
}

/// Changes to the request that every dump of ours makes.
pub fn amend(request: &mut Amendments<'_>) {
    request.link_remap(true);
    request.ghost_limit(GHOST_LIMIT_BYTES);
}

/// CRIU dumps the tree of the first process. What was put in from outside
/// would not be in the images and die with the rest.
fn refuse_strangers(occupation: &Occupation) -> Result<()> {
    let Ok(cgroup) = occupation.cgroup() else { return Ok(()) };
    let strangers = tree::strangers(cgroup, occupation.pid() as u32)?;
    match sentence(&strangers) {
        Some(who) => Err(Error::FailedPrecondition(format!(
            "cannot checkpoint container {}: {who}",
            occupation.context().id()
        ))),
        None => Ok(()),
    }
}

fn sentence(strangers: &[Stranger]) -> Option<String> {
    let names: Vec<_> = strangers
        .iter()
        .map(|stranger| format!("{} (pid {})", stranger.name, stranger.pid))
        .collect();
    (!names.is_empty()).then(|| {
        format!(
            "{} entered it by exec and is no descendant of its first process, which is all \
             that CRIU can save; end it and try again",
            names.join(", ")
        )
    })
}

/// Images hold the container's memory, logs its paths: for root only.
fn make_private(dir: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(Error::io(format!("make {}", dir.display())))
}

/// What has come of it and why, by the lines of CRIU's log, and where the
/// rest of that is.
pub fn explain(
    action: &'static str,
    outcome: String,
    error: &dyn std::error::Error,
    path: &Path,
) -> Error {
    let mut said = format!("{outcome}: {}", chain(error));
    if let Some(lines) = log::explain(path) {
        if !said.contains(&lines) {
            said.push_str(": ");
            said.push_str(&lines);
        }
        said.push_str(&format!(" (whole log: {})", path.display()));
    }
    Error::Runtime { action, said }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_are_named_with_a_remedy() {
        assert_eq!(sentence(&[]), None);
        let one = |pid, name: &str| Stranger { pid, name: name.into() };
        let text = sentence(&[one(7, "sh"), one(8, "sleep")]).unwrap();
        assert!(text.starts_with("sh (pid 7), sleep (pid 8) entered it by exec"), "{text}");
        assert!(text.ends_with("end it and try again"), "{text}");
    }
}
