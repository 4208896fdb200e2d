//! Runtime and checkpoint options, in every form that clients send.
//!
//! A client picks the type by the *name* of the runtime: runc's own types
//! under `io.containerd.runc.*`, the types of the old Linux runtime where it
//! does not know the name, `runtimeoptions` with TOML where a user configured
//! the runtime (Docker, CRI), or nothing at all. All become the two structs
//! below; a type we do not know is refused, because ignoring it would run the
//! container with settings nobody asked for.

use std::{fs, path::Path};

use containerd_shim_protos::{
    protobuf::{Message as _, well_known_types::any::Any},
    shim::oci,
};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::error::{Error, Result};

/// File in the bundle that keeps the options for the `delete` verb, in the
/// format of containerd's own shim.
const OPTIONS_FILE: &str = "options.json";
/// Beside it, the runtime's binary alone: containerd's tools read it.
const RUNTIME_FILE: &str = "runtime";

/// How the OCI runtime is run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RuntimeOptions {
    pub no_pivot_root: bool,
    pub no_new_keyring: bool,
    pub shim_cgroup: String,
    pub io_uid: u32,
    pub io_gid: u32,
    pub binary_name: String,
    pub root: String,
    pub systemd_cgroup: bool,
    pub criu_image_path: String,
    pub criu_work_path: String,
    pub task_api_address: String,
    pub task_api_version: u32,
}

/// What a checkpoint shall do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// Stop the container after the checkpoint.
    pub exit: bool,
    pub open_tcp: bool,
    pub external_unix_sockets: bool,
    pub terminal: bool,
    pub file_locks: bool,
    pub empty_namespaces: Vec<String>,
    pub cgroups_mode: String,
    pub image_path: String,
    pub work_path: String,
}

impl RuntimeOptions {
    /// Decodes the `options` of a Create request or of the `start` verb.
    pub fn decode(any: Option<&Any>) -> Result<Self> {
        let Some(any) = any.filter(|any| !(any.type_url.is_empty() && any.value.is_empty())) else {
            return Ok(Self::default());
        };
        match type_name(any) {
            "containerd.runc.v1.Options" => Self::from_runc(any),
            "containerd.linux.runc.CreateOptions" => Self::from_legacy_create(any),
            "containerd.linux.runc.RuncOptions" => Self::from_legacy_runtime(any),
            "runtimeoptions.v1.Options" | "cri.runtimeoptions.v1.Options" => {
                Self::from_runtimeoptions(any)
            }
            other => Err(Error::InvalidArgument(format!(
                "runtime options of type {other:?} are not known to this shim; it takes \
                 containerd.runc.v1.Options, containerd.linux.runc.CreateOptions and \
                 runtimeoptions.v1.Options"
            ))),
        }
    }

    fn from_runc(any: &Any) -> Result<Self> {
        let from = oci::Options::parse_from_bytes(&any.value).map_err(malformed(any))?;
        Ok(Self {
            no_pivot_root: from.no_pivot_root,
            no_new_keyring: from.no_new_keyring,
            shim_cgroup: from.shim_cgroup,
            io_uid: from.io_uid,
            io_gid: from.io_gid,
            binary_name: from.binary_name,
            root: from.root,
            systemd_cgroup: from.systemd_cgroup,
            criu_image_path: from.criu_image_path,
            criu_work_path: from.criu_work_path,
            task_api_address: from.task_api_address,
            task_api_version: from.task_api_version,
        })
    }

    fn from_legacy_create(any: &Any) -> Result<Self> {
        let from = LegacyCreate::decode(any.value.as_slice()).map_err(malformed(any))?;
        Ok(Self {
            no_pivot_root: from.no_pivot_root,
            no_new_keyring: from.no_new_keyring,
            shim_cgroup: from.shim_cgroup,
            io_uid: from.io_uid,
            io_gid: from.io_gid,
            criu_image_path: from.criu_image_path,
            criu_work_path: from.criu_work_path,
            ..Self::default()
        })
    }

    fn from_legacy_runtime(any: &Any) -> Result<Self> {
        let from = LegacyRuntime::decode(any.value.as_slice()).map_err(malformed(any))?;
        Ok(Self {
            binary_name: from.runtime,
            root: from.runtime_root,
            systemd_cgroup: from.systemd_cgroup,
            ..Self::default()
        })
    }

    /// `type_url` says what the TOML is about; we take any that holds our keys.
    fn from_runtimeoptions(any: &Any) -> Result<Self> {
        let from = Configured::decode(any.value.as_slice()).map_err(malformed(any))?;
        if !from.config_body.is_empty() {
            let text = std::str::from_utf8(&from.config_body).map_err(malformed(any))?;
            return Self::from_toml(text, "the configuration body of the runtime options");
        }
        if from.config_path.is_empty() {
            return Ok(Self::default());
        }
        let text = fs::read_to_string(&from.config_path).map_err(|error| {
            Error::InvalidArgument(format!(
                "read the configuration of the runtime {}: {error}",
                from.config_path
            ))
        })?;
        Self::from_toml(&text, &from.config_path)
    }

    /// Keys as people write them for runc: `BinaryName` as well as
    /// `binary_name`, at the top or in a table `options`.
    fn from_toml(text: &str, origin: &str) -> Result<Self> {
        let invalid = |why: String| Error::InvalidArgument(format!("{origin}: {why}"));
        let mut table: toml::Table = text.parse().map_err(|error| invalid(format!("{error}")))?;
        if let Some(toml::Value::Table(inner)) = table.remove("options") {
            table.extend(inner);
        }
        let mut named = toml::Table::new();
        for (key, value) in table {
            match KEYS.iter().find(|known| plain(known) == plain(&key)) {
                Some(known) => {
                    named.insert((*known).to_owned(), value);
                }
                None => warn!(key, origin, "unknown key in the runtime options, ignored"),
            }
        }
        named.try_into().map_err(|error: toml::de::Error| invalid(error.message().to_owned()))
    }

    /// Leaves them in the bundle for a later `delete`.
    pub fn save(&self, bundle: &Path) -> Result<()> {
        let path = bundle.join(OPTIONS_FILE);
        let text = serde_json::to_vec(self).map_err(Error::other("encode the runtime options"))?;
        fs::write(&path, text).map_err(Error::io(format!("write {}", path.display())))?;
        let path = bundle.join(RUNTIME_FILE);
        fs::write(&path, &self.binary_name).map_err(Error::io(format!("write {}", path.display())))
    }

    /// What [`save`](Self::save) left; the defaults when there is nothing.
    pub fn load(bundle: &Path) -> Result<Self> {
        let path = bundle.join(OPTIONS_FILE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(Error::other(format!("decode {}", path.display()))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(Error::io(format!("read {}", path.display()))(error)),
        }
    }
}

/// The fields of [`RuntimeOptions`], as TOML may set them.
const KEYS: [&str; 12] = [
    "no_pivot_root",
    "no_new_keyring",
    "shim_cgroup",
    "io_uid",
    "io_gid",
    "binary_name",
    "root",
    "systemd_cgroup",
    "criu_image_path",
    "criu_work_path",
    "task_api_address",
    "task_api_version",
];

fn plain(key: &str) -> String {
    key.chars().filter(|c| *c != '_').map(|c| c.to_ascii_lowercase()).collect()
}

impl CheckpointOptions {
    /// Decodes the `options` of a Checkpoint request. None: the client sent
    /// none, so somebody else must decide (see [`crate::container`]).
    pub fn decode(any: Option<&Any>) -> Result<Option<Self>> {
        let Some(any) = any.filter(|any| !(any.type_url.is_empty() && any.value.is_empty())) else {
            return Ok(None);
        };
        match type_name(any) {
            "containerd.runc.v1.CheckpointOptions" => Self::from_runc(any).map(Some),
            "containerd.linux.runc.CheckpointOptions" => Self::from_legacy(any).map(Some),
            // Says how the runtime is configured, not what the checkpoint does.
            "runtimeoptions.v1.Options" | "cri.runtimeoptions.v1.Options" => Ok(None),
            other => Err(Error::InvalidArgument(format!(
                "checkpoint options of type {other:?} are not known to this shim; it takes \
                 containerd.runc.v1.CheckpointOptions and containerd.linux.runc.CheckpointOptions"
            ))),
        }
    }

    fn from_runc(any: &Any) -> Result<Self> {
        let from = oci::CheckpointOptions::parse_from_bytes(&any.value).map_err(malformed(any))?;
        Ok(Self {
            exit: from.exit,
            open_tcp: from.open_tcp,
            external_unix_sockets: from.external_unix_sockets,
            terminal: from.terminal,
            file_locks: from.file_locks,
            empty_namespaces: from.empty_namespaces,
            cgroups_mode: from.cgroups_mode,
            image_path: from.image_path,
            work_path: from.work_path,
        })
    }

    fn from_legacy(any: &Any) -> Result<Self> {
        let from = LegacyCheckpoint::decode(any.value.as_slice()).map_err(malformed(any))?;
        Ok(Self {
            exit: from.exit,
            open_tcp: from.open_tcp,
            external_unix_sockets: from.external_unix_sockets,
            terminal: from.terminal,
            file_locks: from.file_locks,
            empty_namespaces: from.empty_namespaces,
            cgroups_mode: from.cgroups_mode,
            image_path: from.image_path,
            work_path: from.work_path,
        })
    }
}

/// The name after the last `/`: containerd's typeurl writes none before it,
/// protobuf libraries write a host.
fn type_name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

fn malformed<E: std::fmt::Display>(any: &Any) -> impl FnOnce(E) -> Error {
    let name = type_name(any).to_owned();
    move |error| Error::InvalidArgument(format!("decode options of type {name}: {error}"))
}

/// `containerd.linux.runc.CreateOptions`, as far as it still means anything.
#[derive(Clone, PartialEq, prost::Message)]
struct LegacyCreate {
    #[prost(bool, tag = "1")]
    no_pivot_root: bool,
    #[prost(bool, tag = "8")]
    no_new_keyring: bool,
    #[prost(string, tag = "9")]
    shim_cgroup: String,
    #[prost(uint32, tag = "10")]
    io_uid: u32,
    #[prost(uint32, tag = "11")]
    io_gid: u32,
    #[prost(string, tag = "12")]
    criu_work_path: String,
    #[prost(string, tag = "13")]
    criu_image_path: String,
}

/// `containerd.linux.runc.RuncOptions`.
#[derive(Clone, PartialEq, prost::Message)]
struct LegacyRuntime {
    #[prost(string, tag = "1")]
    runtime: String,
    #[prost(string, tag = "2")]
    runtime_root: String,
    #[prost(bool, tag = "4")]
    systemd_cgroup: bool,
}

/// `containerd.linux.runc.CheckpointOptions`. Mind 8 and 9: runc's own type
/// has the two paths the other way round.
#[derive(Clone, PartialEq, prost::Message)]
struct LegacyCheckpoint {
    #[prost(bool, tag = "1")]
    exit: bool,
    #[prost(bool, tag = "2")]
    open_tcp: bool,
    #[prost(bool, tag = "3")]
    external_unix_sockets: bool,
    #[prost(bool, tag = "4")]
    terminal: bool,
    #[prost(bool, tag = "5")]
    file_locks: bool,
    #[prost(string, repeated, tag = "6")]
    empty_namespaces: Vec<String>,
    #[prost(string, tag = "7")]
    cgroups_mode: String,
    #[prost(string, tag = "8")]
    work_path: String,
    #[prost(string, tag = "9")]
    image_path: String,
}

/// `runtimeoptions.v1.Options`.
#[derive(Clone, PartialEq, prost::Message)]
struct Configured {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(string, tag = "2")]
    config_path: String,
    #[prost(bytes = "vec", tag = "3")]
    config_body: Vec<u8>,
}

#[cfg(test)]
mod tests;
