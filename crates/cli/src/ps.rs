//! `transship ps`: the containers that could be moved, and why some cannot.

use clap::Args;
use serde_json::{Value, json};
use transship_api::control::{ContainerEntry, ListRequest};

use crate::{Common, Output, client, error::Failure, print};

const EXAMPLES: &str = "\
Examples:
  transship ps
  transship ps --all-namespaces --output json

MOVABLE is `yes`, or the reasons that keep the container here now.";

/// List the containers that run under Transship's shim.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Ps {
    /// containerd's namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Those of every namespace.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
}

impl Ps {
    pub async fn run(self, common: &Common) -> Result<(), Failure> {
        let what = "the containers could not be listed";
        let client = client::connect(common, what).await?;
        let namespace = if self.all_namespaces { String::new() } else { self.namespace };
        let request = ListRequest { namespace, ..Default::default() };
        let answer = client
            .list(client::look(), &request)
            .await
            .map_err(|e| Failure::from_call(what, &e))?;
        match common.output {
            Output::Json => {
                print::json(&answer.containers.iter().map(as_json).collect::<Vec<_>>().into())
            }
            Output::Text => print::table(
                &["NAMESPACE", "CONTAINER", "IMAGE", "STATUS", "PID", "MEMORY", "MOVABLE"],
                &answer.containers.iter().map(row).collect::<Vec<_>>(),
            ),
        }
        Ok(())
    }
}

fn row(c: &ContainerEntry) -> Vec<String> {
    let reasons: Vec<_> = c.refusals.iter().map(|r| r.reason.as_str()).collect();
    let movable =
        if reasons.is_empty() { "yes".into() } else { format!("no: {}", reasons.join("; ")) };
    vec![
        c.namespace.clone(),
        c.id.clone(),
        c.image.clone(),
        c.status.clone(),
        c.pid.to_string(),
        print::bytes(c.memory_bytes),
        movable,
    ]
}

fn as_json(c: &ContainerEntry) -> Value {
    let refusals: Vec<_> = c
        .refusals
        .iter()
        .map(|r| json!({ "code": r.code, "reason": r.reason, "remedy": r.remedy }))
        .collect();
    json!({
        "namespace": c.namespace,
        "container": c.id,
        "image": c.image,
        "status": c.status,
        "pid": c.pid,
        "memory_bytes": c.memory_bytes,
        "movable": refusals.is_empty(),
        "refusals": refusals,
    })
}
