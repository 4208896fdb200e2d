//! `transship cancel`: end a migration before its commit.

use clap::Args;
use serde_json::json;
use transship_api::control::CancelRequest;

use crate::{
    Common, Output, client,
    error::{Failure, Reason},
    print,
};

const EXAMPLES: &str = "\
Examples:
  transship cancel 0f3c9a…

Waits until the migration has ended. After the commit it is too late: the
container runs on the target, or will within moments.";

/// Cancel a running migration; the container goes on here.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Cancel {
    /// As `transship status` shows it.
    migration: String,
}

impl Cancel {
    pub async fn run(self, common: &Common) -> Result<(), Failure> {
        let what = format!("migration {} was not cancelled", self.migration);
        let client = client::connect(common, &what).await?;
        let request = CancelRequest { migration: self.migration.clone(), ..Default::default() };
        let answer = client
            .cancel(client::patient(), &request)
            .await
            .map_err(|e| Failure::from_call(&what, &e))?;
        if !answer.cancelled {
            let remedy = format!("see `transship status {}`", self.migration);
            let reason = Reason { code: "cancelled".into(), reason: answer.detail, remedy };
            return Err(Failure::new(what, vec![reason]));
        }
        match common.output {
            Output::Json => print::json(&json!({
                "migration": self.migration, "cancelled": true, "outcome": answer.detail,
            })),
            Output::Text => print::line(&format!("cancelled; {}", answer.detail)),
        }
        Ok(())
    }
}
