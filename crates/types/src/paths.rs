//! Where our sockets and records lie on a node. Everything under
//! [`RUNTIME_DIR`] is gone after a reboot; the journal is not.

use std::path::PathBuf;

use sha2::{Digest, Sha256};

use crate::ContainerKey;

/// Sockets and gates; created 0700.
pub const RUNTIME_DIR: &str = "/run/transship";
/// Journals; created 0700.
pub const STATE_DIR: &str = "/var/lib/transship";
/// The file of [`pauses_file`] in it.
pub const PAUSES: &str = "pauses.json";
/// The agent's control socket (0600).
pub const AGENT_SOCKET: &str = "/run/transship/agent.sock";
/// Where a shim that waits for an arrival asks the agent for its connection.
pub const ARRIVALS_SOCKET: &str = "/run/transship/arrivals.sock";
/// Configuration of agent and shim.
pub const CONFIG: &str = "/etc/transship/config.toml";

/// Where shims record what was decided about a migration.
pub fn journal_dir() -> PathBuf {
    PathBuf::from(STATE_DIR).join("journal")
}

/// What the last pauses on this node cost; lost with no harm.
pub fn pauses_file() -> PathBuf {
    PathBuf::from(STATE_DIR).join(PAUSES)
}

/// The control socket of the shim that owns `key`.
///
/// Hashed because a namespace and an id together are longer than the 108
/// bytes of `sockaddr_un` (unix(7)).
pub fn shim_socket(key: &ContainerKey) -> PathBuf {
    let digest = Sha256::digest(key.to_string());
    let short: String = digest.iter().take(16).map(|b| format!("{b:02x}")).collect();
    PathBuf::from(RUNTIME_DIR).join("shim").join(format!("{short}.sock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shim_sockets_fit_and_differ() {
        let long = "n".repeat(76);
        let one = shim_socket(&ContainerKey::new(&long, &long).unwrap());
        let two = shim_socket(&ContainerKey::new("default", &long).unwrap());
        assert!(one.as_os_str().len() < 108);
        assert_ne!(one, two);
    }
}
