//! `transship status`: the migrations this node knows.

use clap::Args;
use serde_json::{Value, json};
use transship_api::control::{MigrationEntry, StatusRequest};

use crate::{Common, Output, client, error::Failure, print, progress, report};

const EXAMPLES: &str = "\
Examples:
  transship status
  transship status 0f3c… --output json

ENDING is `running`; on the source `departed`, `stayed-home` or `in-doubt`
(stopped until the target has answered); on the target `arrived` or
`discarded`. Migrations are remembered across restarts of transshipd. For one
that is named the source also tells how far it is, or how it went.";

/// Show migrations, running and ended, oldest first.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Status {
    /// Only this one.
    migration: Option<String>,
}

impl Status {
    pub async fn run(self, common: &Common) -> Result<(), Failure> {
        let what = "the migrations could not be listed";
        let client = client::connect(common, what).await?;
        let one = self.migration.is_some();
        let migration = self.migration.unwrap_or_default();
        let request = StatusRequest { migration, ..Default::default() };
        let answer = client
            .status(client::look(), &request)
            .await
            .map_err(|e| Failure::from_call(what, &e))?;
        let mut all: Vec<_> = answer.migrations.iter().map(as_json).collect();
        match (common.output, one) {
            (Output::Json, true) if !all.is_empty() => print::json(&all.remove(0)),
            (Output::Json, _) => print::json(&all.into()),
            (Output::Text, _) => {
                print::table(
                    &["MIGRATION", "CONTAINER", "ROLE", "PEER", "PHASE", "ENDING", "ERROR"],
                    &answer.migrations.iter().map(row).collect::<Vec<_>>(),
                );
                let more = answer.migrations.iter().flat_map(more);
                more.for_each(|line| print::line(&line));
            }
        }
        Ok(())
    }
}

fn row(m: &MigrationEntry) -> Vec<String> {
    vec![
        m.migration.clone(),
        format!("{}/{}", m.namespace, m.container),
        m.role.clone(),
        m.peer.clone(),
        m.phase.clone(),
        m.ending.clone(),
        m.error.clone(),
    ]
}

/// Beyond the line of a table.
fn more(m: &MigrationEntry) -> Vec<String> {
    if let Some(report) = m.report.as_ref() {
        // One that did not end there has no state to tell.
        return if report.target_state.is_empty() {
            report::figures(report)
        } else {
            report::text(report)
        };
    }
    let running = m.progress.as_ref().filter(|p| p.round > 0);
    running.map(|p| format!("  {}", progress::round(p))).into_iter().collect()
}

fn as_json(m: &MigrationEntry) -> Value {
    let mut value = json!({
        "migration": m.migration,
        "namespace": m.namespace,
        "container": m.container,
        "role": m.role,
        "peer": m.peer,
        "phase": m.phase,
        "ending": m.ending,
        "error": m.error,
        "started": m.started,
    });
    // Asked for by name only; a list stays a list.
    if let Some(r) = m.report.as_ref() {
        value["report"] = report::as_json(r);
    }
    if let Some(p) = m.progress.as_ref() {
        value["progress"] = json!({
            "phase": p.phase,
            "bytes": p.bytes,
            "bytes_total": p.bytes_total,
            "round": p.round,
            "dirty_bytes": p.dirty_bytes,
            "rate": p.rate,
            "expected_downtime_us": p.expected_downtime_us,
        });
    }
    value
}
