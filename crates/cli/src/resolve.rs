//! `transship resolve`: decide a migration that is in doubt for good.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::Args;
use serde_json::json;
use transship_api::control::{MigrationEntry, ResolveRequest, StatusRequest};

use crate::{
    Common, Output, client,
    error::{Failure, Reason},
    print, status,
};

const EXAMPLES: &str = "\
Examples:
  transship resolve 0f3c9a… --run-here
  transship resolve 0f3c9a… --discard --yes

For a migration whose ENDING is `in-doubt` and whose other node is lost for
good. If that node answers, it is asked instead: with proof nobody has to
decide. What is decided is written down first. The other node hears of it when
it comes back, ends what it has of the container, and may never run it.

On the source --run-here lets the frozen copy go on, as of the freeze, and
--discard ends it. On the target --discard removes what is left of an arrival.";

/// Decide a migration in doubt, without proof.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Resolve {
    /// As `transship status` shows it.
    migration: String,
    #[command(flatten)]
    choice: Choice,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Choice {
    /// The copy on this node runs on; that of the other node must end.
    #[arg(long)]
    run_here: bool,
    /// The copy on this node ends.
    #[arg(long)]
    discard: bool,
}

impl Choice {
    fn word(&self) -> &'static str {
        if self.run_here { "run-here" } else { "discard" }
    }
}

impl Resolve {
    pub async fn run(self, common: &Common) -> Result<(), Failure> {
        let what = format!("migration {} was not resolved", self.migration);
        let client = client::connect(common, &what).await?;
        let failed = |error| Failure::from_call(&what, &error);
        let known = StatusRequest { migration: self.migration.clone(), ..Default::default() };
        let known = client.status(client::look(), &known).await.map_err(failed)?;
        if !self.yes && known.migrations.iter().any(|m| m.ending == "in-doubt") {
            for one in &known.migrations {
                let about = status::doubt(one).into_iter().chain(risks(one, self.choice.run_here));
                about.for_each(|line| drop(writeln!(io::stderr(), "{line}")));
            }
            self.confirm(&what)?;
        }
        let request = ResolveRequest {
            migration: self.migration.clone(),
            choice: self.choice.word().into(),
            ..Default::default()
        };
        let answer = client.resolve(client::patient(), &request).await.map_err(failed)?;
        match common.output {
            Output::Json => print::json(&json!({
                "migration": self.migration, "by": answer.by, "ending": answer.ending,
                "outcome": answer.outcome,
            })),
            Output::Text if answer.by == "proof" => {
                print::line("the other node answered, so nobody had to decide");
                print::line(&answer.outcome);
            }
            Output::Text => print::line(&answer.outcome),
        }
        Ok(())
    }

    fn confirm(&self, what: &str) -> Result<(), Failure> {
        let refused = |reason: &str, remedy: &str| {
            let reason =
                Reason { code: "cancelled".into(), reason: reason.into(), remedy: remedy.into() };
            Failure::new(what, vec![reason])
        };
        if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
            return Err(refused("nobody confirmed it", "add --yes, knowing the above"));
        }
        let _ = write!(io::stderr(), "Type yes to {}: ", self.choice.word());
        let mut answer = String::new();
        let read = io::stdin().lock().read_line(&mut answer);
        if read.is_ok() && answer.trim() == "yes" {
            return Ok(());
        }
        Err(refused("it was not confirmed", ""))
    }
}

/// What may come of it, said plainly.
fn risks(m: &MigrationEntry, run_here: bool) -> Vec<String> {
    let (name, peer) = (format!("{}/{}", m.namespace, m.container), &m.peer);
    let lines = match (m.role.as_str(), run_here) {
        ("source", true) => [
            format!("{name} goes on here as it was at the freeze."),
            format!("If it runs on {peer}, it then runs TWICE, until {peer} can be reached again."),
            format!("Then the copy on {peer} is killed, and what it has done since is lost."),
        ],
        ("source", false) => [
            format!("The frozen copy of {name} on this node is killed."),
            format!("If it does not run on {peer}, it was the last one: {name} is LOST."),
            format!("See whether it runs on {peer} before you do this."),
        ],
        _ => [
            format!("What is left of {name} on this node is killed and removed."),
            format!("{peer} will be told that it never runs here, and goes on with its own copy"),
            "as it was at the freeze. What it may have done here is lost.".to_string(),
        ],
    };
    lines.into_iter().map(|line| format!("  {line}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_risks_name_both_nodes_and_what_may_be_lost() {
        let mut one = MigrationEntry {
            namespace: "default".into(),
            container: "redis".into(),
            role: "source".into(),
            peer: "node-b".into(),
            ..Default::default()
        };
        let told = |one: &MigrationEntry, run_here| risks(one, run_here).join(" ");
        assert!(told(&one, true).contains("TWICE") && told(&one, true).contains("node-b"));
        assert!(told(&one, false).contains("LOST") && told(&one, false).contains("redis"));
        one.role = "target".into();
        assert!(told(&one, false).contains("as it was at the freeze"));
    }
}
