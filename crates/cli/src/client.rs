//! The way to the agent.

use std::{path::Path, time::Duration};

use transship_api::control_ttrpc::AgentClient;
use ttrpc::{asynchronous::Client, context};

use crate::{
    Common,
    error::{Failure, Reason},
};

pub async fn connect(common: &Common, what: &str) -> Result<AgentClient, Failure> {
    let address = format!("unix://{}", common.socket.display());
    match Client::connect(&address).await {
        Ok(client) => Ok(AgentClient::new(client)),
        Err(error) => Err(Failure::new(what, vec![unreachable(&common.socket, &error)])),
    }
}

fn unreachable(socket: &Path, error: &ttrpc::Error) -> Reason {
    // Told apart by looking, not by the text of the error.
    let remedy = match std::os::unix::net::UnixStream::connect(socket) {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => "run it as root",
        _ => "start transshipd on this node (systemctl start transshipd)",
    };
    Reason {
        code: "unreachable".into(),
        reason: format!("transshipd does not answer at {}: {error}", socket.display()),
        remedy: remedy.into(),
    }
}

/// For questions that take a look: a peer may have to probe its CRIU.
pub fn look() -> context::Context {
    context::with_duration(Duration::from_secs(60))
}

/// For calls that take as long as a migration takes.
pub fn patient() -> context::Context {
    context::with_timeout(0)
}
