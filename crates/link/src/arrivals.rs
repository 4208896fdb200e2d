//! How a connection gets from the agent, which accepted it, to the shim that
//! waits for it.
//!
//! The shim connects to the agent's arrivals socket and writes its ticket (32
//! hex digits). It then waits; the agent answers once with a JSON object, and
//! in the good case with the TCP socket beside it, and closes. Nothing has
//! been read from that socket: TLS ends in the shim. A shim that expects more
//! connections under its ticket asks again for each.

mod agent;
mod shim;

pub use agent::{Arrivals, CONNECTIONS, Registration};
pub use shim::{Arrival, wait, wait_at};

use serde::{Deserialize, Serialize};
use transship_types::{MigrationId, NodeName};

use crate::Credentials;

/// Length of a ticket in hex.
const TICKET: usize = 32;

/// Three paths and two names; far more than they can need.
const ANSWER_MAX: usize = 16 << 10;

/// The agent's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Granted {
        #[serde(flatten)]
        credentials: Credentials,
        peer: NodeName,
        migration: Option<MigrationId>,
    },
    Refused {
        reason: String,
    },
}
