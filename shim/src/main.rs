//! `containerd-shim-transship-v2`: containerd's runtime-v2 shim of Transship.
//!
//! containerd runs it with a verb: `start` answers the address of a server
//! (which it forks, or which serves the pod already), `delete` cleans up
//! after a server that died, `-info` describes the runtime.
#![deny(unsafe_code)]

mod arrive;
mod cgroup;
mod checkpoint;
mod cleanup;
mod container;
mod control;
mod depart;
mod error;
mod events;
mod fill;
mod guardian;
mod held;
mod inspect;
mod mounts;
mod netns;
mod oci;
mod options;
mod plan;
mod pod;
mod process;
mod reaper;
mod restore;
mod server;
mod start;
mod stdio;
#[allow(unsafe_code)]
mod sys;
mod task;
mod tmpfs;
mod tree;
mod tuning;

use std::{env, process::ExitCode};

use containerd_shim::{Flags, parse};

use crate::error::{Error, Result};

fn main() -> ExitCode {
    // First of all: the OCI runtime runs this executable under the name of
    // CRIU, and then nothing of the shim may happen.
    transship_criu::stub::become_criu_if_asked();
    guardian::stand_guard_if_asked();
    tmpfs::fill_if_asked();
    sys::spare_memory();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows what a verb wrote before it failed.
            eprintln!("{}: {}", transship_types::RUNTIME, error.sentence());
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let flags = parse(&arguments).map_err(|error| Error::InvalidArgument(error.to_string()))?;
    if flags.version {
        println!("{} {}", transship_types::RUNTIME, env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if flags.info {
        return start::info();
    }
    match flags.action.as_str() {
        "start" => start::start(&checked(flags)?),
        "delete" => cleanup::delete(&checked(flags)?),
        other => Err(Error::InvalidArgument(format!(
            "action {other:?} is not known; containerd runs this program with start or delete"
        ))),
    }
}

/// The verbs work on a container; its name becomes part of paths.
fn checked(flags: Flags) -> Result<Flags> {
    transship_types::ContainerKey::new(&flags.namespace, &flags.id)
        .map_err(|error| Error::InvalidArgument(error.to_string()))?;
    Ok(flags)
}
