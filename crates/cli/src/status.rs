//! `transship status`: the migrations this node knows.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::{Value, json};
use transship_api::control::{MigrationEntry, StatusRequest};

use crate::{Common, Output, client, error::Failure, print, progress, report};

const EXAMPLES: &str = "\
Examples:
  transship status
  transship status 0f3c… --output json

ENDING is `running`; on the source `departed`, `stayed-home` or `in-doubt`
(stopped until the target has answered; `transship resolve` if it never will)
or, by a person's decision, `discarded`; on the target `arrived` or `discarded`. Migrations are remembered across restarts of transshipd. For one
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
    let mut lines = doubt(m);
    if let Some(report) = m.report.as_ref() {
        // One that did not end there has no state to tell.
        lines.extend(if report.target_state.is_empty() {
            report::figures(report)
        } else {
            report::text(report)
        });
        return lines;
    }
    let running = m.progress.as_ref().filter(|p| p.round > 0);
    lines.extend(running.map(|p| format!("  {}", progress::round(p))));
    lines
}

/// What is known of a doubt, and of what a person has decided about it.
pub fn doubt(m: &MigrationEntry) -> Vec<String> {
    let Some(d) = m.doubt.as_ref() else { return vec![] };
    let (name, peer) = (format!("{}/{}", m.namespace, m.container), &m.peer);
    let mut lines = Vec::new();
    if m.ending == "in-doubt" {
        let since = ago(d.since);
        lines
            .push(format!("{name} is in doubt since {since}; the journal here says {}", d.journal));
        if !d.answer.is_empty() {
            lines.push(format!("  {peer} was asked {}: {}", ago(d.asked), d.answer));
        }
    }
    if !d.decision.is_empty() {
        let heard = if d.followed { "has followed it" } else { "has not heard of it yet" };
        lines.push(format!("{name}: {}, decided {}; {peer} {heard}", d.decision, ago(d.decided)));
    }
    if d.both_ran {
        lines.push(format!("  BOTH NODES RAN {name}, until the decision was followed"));
    }
    lines
}

fn ago(seconds: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    match u64::try_from(seconds).ok().filter(|at| *at > 0) {
        Some(at) => format!("{} s ago", now.saturating_sub(at)),
        None => "an unknown time".into(),
    }
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
    if let Some(d) = m.doubt.as_ref() {
        value["doubt"] = json!({
            "since": d.since,
            "journal": d.journal,
            "asked": d.asked,
            "answer": d.answer,
            "decision": d.decision,
            "decided": d.decided,
            "followed": d.followed,
            "both_ran": d.both_ran,
        });
    }
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

#[cfg(test)]
mod tests {
    use transship_api::control::Doubt;

    use super::*;

    #[test]
    fn a_doubt_says_what_is_known_and_that_both_ran() {
        let mut one = MigrationEntry {
            namespace: "default".into(),
            container: "redis".into(),
            peer: "b".into(),
            ending: "in-doubt".into(),
            doubt: Some(Doubt {
                since: 5,
                journal: "committed".into(),
                asked: 7,
                answer: "no route".into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let text = doubt(&one).join("\n");
        for words in ["committed", "b was asked", "no route"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(!text.contains("BOTH"), "{text}");
        one.ending = "stayed-home".into();
        let known = one.doubt.mut_or_insert_default();
        (known.decision, known.both_ran) = ("run-here".into(), true);
        let text = doubt(&one).join("\n");
        assert!(text.contains("has not heard") && text.contains("BOTH"), "{text}");
        assert_eq!(as_json(&one)["doubt"]["both_ran"], true);
    }
}
