//! The processes a node consists of; started by the harness, not by people
//! (for them: `hack/two-nodes.sh`).
#![forbid(unsafe_code)]

use std::{env, process::exit};

use anyhow::{Context, Result, bail};
use transship_integration::inside;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let verb = arguments.first().map(String::as_str).unwrap_or_default();
    if verb == "switch" {
        return inside::switch();
    }
    let plan = arguments.get(1).context("the plan of a node is missing")?;
    let plan = serde_json::from_str(plan).context("the plan of a node")?;
    match verb {
        "supervise" => inside::supervise(&plan),
        "enclose" => inside::enclose(&plan),
        "init" => inside::init(&plan),
        "exec" => {
            let init = arguments
                .get(2)
                .and_then(|pid| pid.parse().ok())
                .context("the pid of a node's pid 1")?;
            exit(inside::exec(&plan, init, &arguments[3..])?)
        }
        other => bail!("unknown verb {other:?}"),
    }
}
