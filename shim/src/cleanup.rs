//! The verb `delete`: what a server that died has left behind.
//!
//! Runs without the server: whatever is needed to know lies in the bundle.

use std::{
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use containerd_shim::Flags;
use containerd_shim_protos::{api::DeleteResponse, protobuf::Message};
use nix::libc;
use transship_criu::Gate;
use transship_types::ContainerKey;

use crate::{
    error::{Error, Result},
    events::timestamp,
    mounts,
    oci::{self, Oci},
    options::RuntimeOptions,
    pod::{answers, remove_quietly, remove_stale_control},
    start::socket_path,
    tmpfs,
};

pub fn delete(flags: &Flags) -> Result<()> {
    let bundle = bundle(flags)?;
    let key = ContainerKey::new(&flags.namespace, &flags.id)
        .map_err(|error| Error::InvalidArgument(error.to_string()))?;
    // Each step on its own: one that fails must not keep the others from
    // being done, and containerd must get its answer.
    let options = RuntimeOptions::load(&bundle).unwrap_or_else(|error| {
        complain("read the options", &error);
        RuntimeOptions::default()
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::io("start the runtime"))?;
    let oci = Oci::new(&options, &flags.namespace, &bundle);
    runtime.block_on(async {
        if let Err(error) = oci.delete(key.id(), true).await {
            complain("delete the container", &error);
        }
        if let Err(error) = mounts::unmount(&bundle.join("rootfs")).await {
            complain("unmount the root filesystem", &error);
        }
        if let Err(error) = mounts::unmount(&bundle.join(tmpfs::DIRECTORY)).await {
            complain("unmount what was made for a restore", &error);
        }
    });
    Gate::sweep();
    remove_stale_control(&key);
    remove_stale_task_socket(&bundle);

    let pid = oci::read_pid(&bundle.join("init.pid")).unwrap_or(0);
    let response = DeleteResponse {
        pid: pid as u32,
        exit_status: 128 + libc::SIGKILL as u32,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    };
    let bytes = response.write_to_bytes().map_err(Error::other("encode the answer to delete"))?;
    io::stdout().write_all(&bytes).map_err(Error::io("answer containerd"))
}

/// The flag, or the sibling of the directory we run in (a pod's shim is
/// deleted from the bundle of any of its containers).
fn bundle(flags: &Flags) -> Result<PathBuf> {
    if !flags.bundle.is_empty() {
        return Ok(flags.bundle.clone().into());
    }
    let here = env::current_dir().map_err(Error::io("find the bundle"))?;
    Ok(here.parent().unwrap_or(Path::new("/")).join(&flags.id))
}

/// Other containers of the pod may still be served there.
fn remove_stale_task_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else { return };
    let socket = socket_path(address.trim());
    if !answers(&socket) {
        remove_quietly(&socket);
    }
}

/// To containerd's log; standard output is the answer.
fn complain(doing: &str, error: &Error) {
    eprintln!("{}: cannot {doing}: {}", transship_types::RUNTIME, error.sentence());
}
