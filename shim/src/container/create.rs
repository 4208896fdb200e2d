//! Making a container: its root filesystem, its stdio, its first process.

use std::{collections::BTreeMap, fs, io, path::Path, sync::Arc};

use containerd_shim_protos::{
    api::{CreateTaskRequest, Mount},
    events::task::{TaskCreate, TaskIO},
};
use serde::Deserialize;
use tracing::warn;
use transship_types::{ContainerKey, TICKET_ANNOTATION};

use super::{Container, Context, Origin, owner};
use crate::{
    error::{Error, Result},
    events::Event,
    mounts,
    oci::{self, Oci},
    options::RuntimeOptions,
    pod::Pod,
    process::Process,
    stdio::{Owner as StdioOwner, Prepared, Urls},
};

/// Makes the container and publishes that; answers its pid, 0 if Start will
/// bring it (a checkpoint or an arrival).
pub async fn create(pod: &Pod, request: CreateTaskRequest) -> Result<u32> {
    let key = ContainerKey::new(pod.namespace(), &request.id)
        .map_err(|error| Error::InvalidArgument(error.to_string()))?;
    let reservation = pod.reserve(&request.id)?;
    let options = RuntimeOptions::decode(request.options.as_ref())?;
    let bundle = Path::new(&request.bundle).to_owned();
    let head = Head::read(&bundle)?;
    let origin = origin(&request, &options, &head)?;
    options.save(&bundle)?;

    let context = Arc::new(Context {
        oci: Oci::new(&options, pod.namespace(), &bundle),
        rootfs: (!request.rootfs.is_empty()).then(|| bundle.join("rootfs")),
        urls: Urls {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        },
        private_pids: head.private_pids(),
        annotations: head.annotations,
        key,
        bundle,
        options,
    });
    if let Some(rootfs) = &context.rootfs {
        mount_all(&request.rootfs, rootfs).await?;
    }
    let made = first_process(&context, &origin).await;
    let (process, prepared) = match made {
        Ok(made) => made,
        Err(error) => {
            abandon(&context).await;
            return Err(error);
        }
    };

    let pid = process.pid as u32;
    pod.publisher().publish(Event::Create(TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: Some(TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..Default::default()
        })
        .into(),
        checkpoint: request.checkpoint,
        pid,
        ..Default::default()
    }));
    let requests = owner::spawn(pod.clone(), context.clone(), origin, process, prepared);
    reservation.fill(Container { context, requests });
    Ok(pid)
}

/// Runs the OCI runtime, unless Start will bring the process.
async fn first_process(
    context: &Arc<Context>,
    origin: &Origin,
) -> Result<(Process, Option<Prepared>)> {
    let prepared = open_stdio(context).await?;
    let mut process = Process::new(context.urls.clone());
    if *origin != Origin::Fresh {
        return Ok((process, Some(prepared)));
    }
    let mut command = context.oci.command("create");
    command.arg("--bundle").arg(&context.bundle).arg("--pid-file").arg(context.pid_file());
    if context.options.no_pivot_root {
        command.arg("--no-pivot");
    }
    if context.options.no_new_keyring {
        command.arg("--no-new-keyring");
    }
    prepared.attach(&mut command)?;
    command.arg(context.id());
    context.oci.finish("create", command).await?;
    process.live = Some(prepared.connect().await?);
    process.pid = oci::read_pid(&context.pid_file())?;
    Ok((process, None))
}

/// Stdio for the first process.
pub(super) async fn open_stdio(context: &Context) -> Result<Prepared> {
    let owner = StdioOwner { uid: context.options.io_uid, gid: context.options.io_gid };
    Prepared::open(&context.key, &context.urls, owner).await
}

/// A Create that failed leaves nothing behind.
async fn abandon(context: &Context) {
    if let Err(error) = context.oci.delete(context.id(), true).await {
        warn!(container = context.id(), error = error.sentence(), "cannot undo Create");
    }
    if let Some(rootfs) = context.rootfs.clone()
        && let Err(error) = mounts::unmount(&rootfs).await
    {
        warn!(container = context.id(), error = error.sentence(), "cannot unmount after Create");
    }
}

async fn mount_all(wanted: &[Mount], rootfs: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    match fs::DirBuilder::new().mode(0o711).create(rootfs) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::io(format!("make {}", rootfs.display()))(error));
        }
        _ => {}
    }
    let mounted = mounts::mount(wanted.to_vec(), rootfs.to_owned()).await;
    if mounted.is_err()
        && let Err(error) = mounts::unmount(rootfs).await
    {
        warn!(path = %rootfs.display(), error = error.sentence(), "cannot unmount again");
    }
    mounted
}

/// A ticket wins: the daemon of the target knows nothing of checkpoints.
fn origin(request: &CreateTaskRequest, options: &RuntimeOptions, head: &Head) -> Result<Origin> {
    if let Some(ticket) = head.annotations.get(TICKET_ANNOTATION) {
        let ticket = ticket.parse().map_err(|error| {
            Error::InvalidArgument(format!("annotation {TICKET_ANNOTATION}: {error}"))
        })?;
        return Ok(Origin::Arrival(ticket));
    }
    let images = [&request.checkpoint, &options.criu_image_path];
    Ok(match images.into_iter().find(|path| !path.is_empty()) {
        Some(images) => Origin::Checkpoint {
            images: images.into(),
            parent: (!request.parent_checkpoint.is_empty())
                .then(|| request.parent_checkpoint.clone().into()),
        },
        None => Origin::Fresh,
    })
}

/// The few parts of the OCI spec that every container needs.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Head {
    #[serde(deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
    linux: HeadLinux,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HeadLinux {
    #[serde(deserialize_with = "nullable")]
    namespaces: Vec<HeadNamespace>,
}

#[derive(Debug, Deserialize)]
struct HeadNamespace {
    r#type: String,
    #[serde(default)]
    path: String,
}

/// Go writes an empty map or list as `null`.
fn nullable<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Head {
    pub fn read(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let text = fs::read(&path).map_err(Error::io(format!("read {}", path.display())))?;
        serde_json::from_slice(&text).map_err(|error| {
            let why = Error::json(&error);
            Error::InvalidArgument(format!("{} is no OCI spec: {why}", path.display()))
        })
    }

    fn private_pids(&self) -> bool {
        self.linux.namespaces.iter().any(|ns| ns.r#type == "pid" && ns.path.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(json: &str) -> Head {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_pid_namespace_is_private_unless_it_is_joined() {
        for (namespaces, private) in [
            (r#"[{"type":"pid"}]"#, true),
            (r#"[{"type":"pid","path":"/proc/1/ns/pid"}]"#, false),
            (r#"[{"type":"mount"}]"#, false),
            ("null", false),
        ] {
            let json = format!(r#"{{"annotations":null,"linux":{{"namespaces":{namespaces}}}}}"#);
            assert_eq!(head(&json).private_pids(), private, "{namespaces}");
        }
    }

    #[test]
    fn start_restores_what_a_ticket_a_request_or_an_option_names() {
        let ticket = "0123456789abcdef0123456789abcdef";
        let arriving = head(&format!(r#"{{"annotations":{{"{TICKET_ANNOTATION}":"{ticket}"}}}}"#));
        let plain = head("{}");
        let from = CreateTaskRequest { checkpoint: "/images".into(), ..Default::default() };
        let none = CreateTaskRequest::default();
        let options = RuntimeOptions::default();
        let by_option = RuntimeOptions { criu_image_path: "/opt".into(), ..Default::default() };
        let images = |path: &str| Origin::Checkpoint { images: path.into(), parent: None };

        assert_eq!(
            origin(&from, &options, &arriving).unwrap(),
            Origin::Arrival(ticket.parse().unwrap())
        );
        assert_eq!(origin(&from, &by_option, &plain).unwrap(), images("/images"));
        assert_eq!(origin(&none, &by_option, &plain).unwrap(), images("/opt"));
        assert_eq!(origin(&none, &options, &plain).unwrap(), Origin::Fresh);
        let forged = head(&format!(r#"{{"annotations":{{"{TICKET_ANNOTATION}":"x"}}}}"#));
        assert!(matches!(origin(&none, &options, &forged), Err(Error::InvalidArgument(_))));
    }
}
