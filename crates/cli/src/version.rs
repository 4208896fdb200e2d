//! `transship version`: the versions that matter.

use clap::Args;
use serde_json::json;
use transship_api::control::VersionRequest;

use crate::{Common, Output, client, error::Failure, print};

/// Show the versions of this program, the agent, and what it works with.
#[derive(Args)]
pub struct Version {}

impl Version {
    pub async fn run(self, common: &Common) -> Result<(), Failure> {
        let what = "the agent's version could not be asked for";
        let client = client::connect(common, what).await?;
        let v = client
            .version(client::look(), &VersionRequest::default())
            .await
            .map_err(|e| Failure::from_call(what, &e))?;
        let own = env!("CARGO_PKG_VERSION");
        match common.output {
            Output::Json => print::json(&json!({
                "transship": own,
                "transshipd": v.version,
                "protocol": v.protocol,
                "node": v.node,
                "kernel": v.kernel,
                "criu": v.criu,
                "daemon": v.containerd,
            })),
            Output::Text => {
                let rows = [
                    ("transship", own.to_string()),
                    ("transshipd", format!("{} on {}", v.version, v.node)),
                    ("protocol", v.protocol.to_string()),
                    ("kernel", v.kernel),
                    ("CRIU", v.criu),
                    ("daemon", v.containerd),
                ];
                for (name, value) in rows {
                    print::line(&format!("{name:<11} {value}"));
                }
            }
        }
        Ok(())
    }
}
