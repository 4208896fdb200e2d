//! `transship check`: would it work?

use clap::Args;
use serde_json::{Value, json};
use transship_api::control::{CheckRequest, CheckResult};

use crate::{
    Common, Output, client,
    error::{Failure, Reason},
    print,
};

const EXAMPLES: &str = "\
Examples:
  transship check                  this node: kernel, CRIU, containerd, certificate
  transship check --to node-b      and the way to node-b, its CPU and its CRIU

Exits with 1 when something is missing.";

/// Check this node and the way to another.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Check {
    /// A node of transshipd's configuration, or NODE@HOST:PORT.
    #[arg(long, value_name = "NODE")]
    to: Option<String>,
}

impl Check {
    pub async fn run(self, common: &Common) -> Result<(), Failure> {
        let what = "not everything that a migration needs is there";
        let client = client::connect(common, what).await?;
        let request = CheckRequest { node: self.to.unwrap_or_default(), ..Default::default() };
        let answer = client
            .check(client::look(), &request)
            .await
            .map_err(|e| Failure::from_call(what, &e))?;
        let missing: Vec<_> = answer.results.iter().filter(|r| !r.ok).collect();
        match common.output {
            // One object on standard output, whatever it says.
            Output::Json => {
                let results: Vec<_> = answer.results.iter().map(as_json).collect();
                if missing.is_empty() {
                    print::json(&json!({ "ok": true, "results": results }));
                }
            }
            Output::Text => {
                let rows: Vec<_> = answer.results.iter().map(row).collect();
                print::table(&["CHECK", "", "FOUND"], &rows);
                for soon in answer.results.iter().filter(|r| is_warning(r)) {
                    print::line(&format!("{}: {}", soon.name, soon.remedy));
                }
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let reasons = missing.into_iter().map(reason).collect();
        Err(Failure::new(what, reasons))
    }
}

/// It works, and will not if nobody does anything.
fn is_warning(r: &CheckResult) -> bool {
    r.ok && !r.remedy.is_empty()
}

fn row(r: &CheckResult) -> Vec<String> {
    let verdict = match r.ok {
        true if is_warning(r) => "SOON",
        true => "ok",
        false => "FAILED",
    };
    vec![r.name.clone(), verdict.into(), r.detail.clone()]
}

fn reason(r: &CheckResult) -> Reason {
    Reason {
        code: "check".into(),
        reason: format!("{}: {}", r.name, r.detail),
        remedy: r.remedy.clone(),
    }
}

fn as_json(r: &CheckResult) -> Value {
    json!({ "name": r.name, "ok": r.ok, "detail": r.detail, "remedy": r.remedy })
}
