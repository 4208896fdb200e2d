//! The configuration file, with the command line laid over it.
//!
//! ```toml
//! listen = "0.0.0.0:7430"
//!
//! [credentials]
//! ca = "/etc/transship/ca.pem"
//! certificate = "/etc/transship/node.pem"
//! key = "/etc/transship/node.key"
//!
//! [peers.node-b]
//! address = "10.0.0.2:7430"
//! ```
//!
//! Everything has a default but the peers; unknown keys are refused, since a
//! misspelt limit would otherwise be no limit.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use thiserror::Error;
use transship_link::Credentials;
use transship_types::{NodeName, RUNTIME, RUNTIME_AS_RUNC, paths};

use crate::{access::Nodes, tuning::Memory};

/// The port of a node's agent unless told otherwise.
pub const PORT: u16 = 7430;

#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("{} cannot be read", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The text of `source` shows the line and what is wrong with it.
    #[error("{} is not a valid configuration", path.display())]
    Invalid {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("{}: [peers.{name}] has the address {address:?}; HOST:PORT is wanted", path.display())]
    Address { path: PathBuf, name: NodeName, address: String },
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Checked against the certificate, which is what names a node.
    pub node: Option<NodeName>,
    #[serde(default = "default_listen")]
    pub listen: String,
    #[serde(default = "default_credentials")]
    pub credentials: Credentials,
    #[serde(default)]
    pub peers: BTreeMap<NodeName, Peer>,
    /// Nodes that may send containers here.
    #[serde(default)]
    pub receive_from: Nodes,
    /// Nodes to which containers may be sent from here.
    #[serde(default)]
    pub send_to: Nodes,
    #[serde(default)]
    pub control: Control,
    #[serde(default)]
    pub containerd: Containerd,
    /// containerd's names for runtimes that are our shim.
    #[serde(default = "default_runtimes")]
    pub runtimes: Vec<String>,
    #[serde(default)]
    pub limits: Limits,
    /// What migrations from here do unless they are told otherwise.
    #[serde(default)]
    pub memory: Memory,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// HOST:PORT.
    pub address: String,
}

/// Who may use the control socket beside root.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Control {
    /// A name or a number.
    pub group: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Containerd {
    pub address: PathBuf,
}

impl Default for Containerd {
    fn default() -> Self {
        Self { address: "/run/containerd/containerd.sock".into() }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Memory that must remain available after an arrival, in MiB.
    pub memory_reserve_mib: u64,
    /// Disk that must remain free below the daemon's root, in MiB.
    pub disk_reserve_mib: u64,
    /// Connections from other nodes at a time.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory_reserve_mib: 64, disk_reserve_mib: 256, connections: 64 }
    }
}

fn default_listen() -> String {
    format!("0.0.0.0:{PORT}")
}

fn default_credentials() -> Credentials {
    let beside = |name: &str| Path::new(paths::CONFIG).with_file_name(name);
    Credentials {
        ca: beside("ca.pem"),
        certificate: beside("node.pem"),
        key: beside("node.key"),
        crl: None,
    }
}

fn default_runtimes() -> Vec<String> {
    vec![RUNTIME.into(), RUNTIME_AS_RUNC.into()]
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node: None,
            listen: default_listen(),
            credentials: default_credentials(),
            peers: BTreeMap::new(),
            receive_from: Nodes::default(),
            send_to: Nodes::default(),
            control: Control::default(),
            containerd: Containerd::default(),
            runtimes: default_runtimes(),
            limits: Limits::default(),
            memory: Memory::default(),
        }
    }
}

impl Config {
    /// A file that was asked for must be there; the default one need not be.
    pub fn load(asked: Option<&Path>) -> Result<Config, ConfigError> {
        let path = asked.unwrap_or(Path::new(paths::CONFIG));
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text),
            Err(e) if asked.is_none() && e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Unreadable { path: path.into(), source }),
        }
    }

    fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text).map_err(|source| ConfigError::Invalid {
            path: path.into(),
            source: Box::new(source),
        })?;
        for (name, peer) in &config.peers {
            if !is_address(&peer.address) {
                return Err(ConfigError::Address {
                    path: path.into(),
                    name: name.clone(),
                    address: peer.address.clone(),
                });
            }
        }
        Ok(config)
    }
}

/// HOST:PORT; whether the host exists shows when it is called.
pub fn is_address(text: &str) -> bool {
    text.rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0))
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("config.toml"), text)
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn everything_can_be_said() {
        let config = parse(
            r#"
            node = "a"
            listen = "10.0.0.1:99"
            receive_from = ["b"]
            send_to = ["rack1-*", "b"]
            runtimes = ["io.containerd.transship.v2"]
            credentials = { ca = "/c", certificate = "/n", key = "/k", crl = "/r" }
            [peers.b]
            address = "b.example.org:7430"
            [control]
            group = "movers"
            [containerd]
            address = "/run/k3s/containerd/containerd.sock"
            [limits]
            memory_reserve_mib = 1
            disk_reserve_mib = 2
            connections = 3
            [memory]
            max_pause = "50ms"
            throttle = "never"
            post_copy = "auto"
            lanes = 4
            bandwidth = "1Gbit/s"
            compress = "lz4"
            "#,
        )
        .unwrap();
        assert_eq!(config.peers[&"b".parse().unwrap()].address, "b.example.org:7430");
        assert_eq!(config.limits.connections, 3);
        assert_eq!(config.memory.bandwidth, Some(125_000_000));
        assert_eq!(parse("[memory]\nbandwidth = \"none\"").unwrap().memory, Memory::default());
    }

    #[test]
    fn a_mistake_is_shown_with_its_line() {
        for (text, line, word) in [
            ("listen = \"x:1\"\nlisen = 1", "line 2", "lisen"),
            ("[limits]\n\nmemory_reserve_mb = 1", "line 3", "memory_reserve_mb"),
            ("[peers.B]\naddress = \"b:1\"", "line 1", "only a-z"),
            ("node = 7", "line 1", "string"),
            ("[peers.b]\n", "line 1", "address"),
            ("\nreceive_from = [\"b_*\"]", "line 2", "only a-z"),
            ("send_to = \"b\"", "line 1", "sequence"),
            ("[memory]\nmax_pause = 100", "line 2", "string"),
            ("[memory]\nmax_pause = \"2h\"", "line 2", "100ms"),
            ("[memory]\nmax_pause = \"90s\"", "line 2", "from 1ms to 60s"),
            ("[memory]\nthrottle = \"on\"", "line 2", "auto, never"),
            ("[memory]\nlanes = 0", "line 2", "from 1 to 16"),
            ("[memory]\nbandwidth = \"1\"", "line 2", "1Gbit/s"),
        ] {
            let error = parse(text).unwrap_err();
            let shown = error.source().unwrap().to_string();
            assert!(shown.contains(line) && shown.contains(word), "{text:?}: {shown}");
        }
    }

    #[test]
    fn an_address_has_a_host_and_a_port() {
        for (address, good) in
            [("b:1", true), ("[::1]:7430", true), ("b", false), (":1", false), ("b:0", false)]
        {
            let text = format!("[peers.b]\naddress = {address:?}");
            assert_eq!(parse(&text).is_ok(), good, "{address}");
        }
    }

    #[test]
    fn only_a_file_that_was_asked_for_must_exist() {
        assert!(Config::load(Some(Path::new("/nonexistent/config.toml"))).is_err());
    }
}
