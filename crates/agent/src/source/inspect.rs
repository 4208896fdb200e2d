//! Whether a container can leave, and what has to be known about it.

use transship_api::{
    control::Tuning,
    session::{Container, Descriptor, Stdio},
};
use transship_types::{Code, ContainerKey, Refusal};

use crate::{
    daemon::{DaemonError, Task, TaskStatus},
    failure::{Failure, Step, from_control},
    node::Node,
    tuning::wants_post_copy,
};

pub struct Subject {
    pub record: Container,
    pub stdio: Stdio,
    pub content: Vec<Descriptor>,
    /// Digests this node does not have either.
    pub absent: Vec<String>,
    pub memory_bytes: u64,
    pub rootfs_bytes: u64,
    /// Name and version of the OCI runtime.
    pub runtime: String,
}

impl Subject {
    /// How much those blobs of the image are.
    pub fn bytes_of(&self, digests: &[String]) -> u64 {
        let wanted = self.content.iter().filter(|blob| digests.contains(&blob.digest));
        wanted.map(|blob| blob.size.unsigned_abs()).fold(0, u64::saturating_add)
    }
}

/// Everything about the container, or every reason against moving it.
pub async fn inspect(node: &Node, key: &ContainerKey, tuning: &Tuning) -> Step<Subject> {
    let (subject, refusals) = look(node, key, tuning).await?;
    if refusals.is_empty() { Ok(subject) } else { Err(Failure(refusals)) }
}

/// The same with both, as far as there is something to look at.
pub async fn look(
    node: &Node,
    key: &ContainerKey,
    tuning: &Tuning,
) -> Step<(Subject, Vec<Refusal>)> {
    let found = node.daemon.describe(key).await.map_err(|e| unknown(node, key, e))?;
    let state = refusals_of(node, key, &found.record.runtime, found.task.as_ref());
    let task = match (state.is_empty(), found.task) {
        (true, Some(task)) => task,
        // The shim of a task that is not there cannot be asked for more.
        _ => return Err(Failure(state)),
    };
    let looked = node.shims.inspect(key).await?;
    let mut refusals: Vec<Refusal> = looked.refusals.into_iter().map(from_control).collect();
    if wants_post_copy(tuning) && !looked.post_copy {
        refusals.push(Refusal::new(
            Code::Unsupported,
            format!("the shim of {key} does not let it run before all of its memory is there"),
            "use --post-copy never, or give it a longer --max-pause",
        ));
    }
    let (content, absent) = match content(node, key).await {
        Ok(found) => found,
        Err(failure) => {
            refusals.extend(failure.0);
            Default::default()
        }
    };
    let subject = Subject {
        record: found.record,
        stdio: task.stdio,
        content,
        absent,
        memory_bytes: looked.memory_bytes,
        rootfs_bytes: looked.rootfs_bytes,
        runtime: looked.runtime,
    };
    Ok((subject, refusals))
}

/// What the daemon's own record says against moving it.
pub fn refusals_of(
    node: &Node,
    key: &ContainerKey,
    runtime: &str,
    task: Option<&Task>,
) -> Vec<Refusal> {
    if !node.is_ours(runtime) {
        return vec![Refusal::new(
            Code::ForeignRuntime,
            format!("{key} runs under {runtime}"),
            format!("start it with the runtime {}", transship_types::RUNTIME),
        )];
    }
    let state = match task.map(|t| t.status) {
        Some(TaskStatus::Running) => return vec![],
        Some(status) => format!("the task of {key} is {}", status.as_str()),
        None => format!("{key} has no task"),
    };
    let remedy = match task.map(|t| t.status) {
        Some(TaskStatus::Paused) => "only a running container can be moved; resume it",
        _ => "only a running container can be moved; start it",
    };
    vec![Refusal::new(Code::NotRunning, state, remedy)]
}

async fn content(node: &Node, key: &ContainerKey) -> Step<(Vec<Descriptor>, Vec<String>)> {
    let content = node.daemon.origin_of(key).await?;
    let absent = node.daemon.missing(key.namespace(), &content).await?;
    Ok((content, absent))
}

fn unknown(node: &Node, key: &ContainerKey, error: DaemonError) -> Failure {
    match error {
        DaemonError::NotFound { .. } => Failure::new(
            Code::UnknownContainer,
            format!(
                "there is no container {} in namespace {} on {}",
                key.id(),
                key.namespace(),
                node.name()
            ),
            "see `transship ps --all-namespaces`",
        ),
        other => other.into(),
    }
}
