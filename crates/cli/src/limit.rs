//! `transship limit`: another bandwidth for a migration that runs.

use clap::Args;
use serde_json::json;
use transship_api::control::LimitRequest;

use crate::{
    Common, Output, client,
    error::Failure,
    print,
    tuning::{self, Bandwidth},
};

const EXAMPLES: &str = "\
Examples:
  transship limit 0f3c… --bandwidth 200Mbit/s
  transship limit 0f3c… --bandwidth none

It holds from the next pages on, for all lanes of the migration together.
Less bandwidth means more rounds and, if the container writes faster than
that, a longer pause.";

/// Change the bandwidth of a running migration.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Limit {
    /// As `transship status` shows it.
    migration: String,
    /// For pages on the wire: 1Gbit/s, 100MiB/s, none.
    #[arg(long, value_name = "RATE", value_parser = tuning::bandwidth)]
    bandwidth: Bandwidth,
}

impl Limit {
    pub async fn run(self, common: &Common) -> Result<(), Failure> {
        let what = format!("the bandwidth of migration {} was not changed", self.migration);
        let client = client::connect(common, &what).await?;
        let Bandwidth(rate) = self.bandwidth;
        let request = LimitRequest {
            migration: self.migration.clone(),
            bandwidth: rate.unwrap_or(0),
            ..Default::default()
        };
        client.limit(client::look(), &request).await.map_err(|e| Failure::from_call(&what, &e))?;
        match common.output {
            Output::Json => {
                print::json(&json!({ "migration": self.migration, "bandwidth": rate }));
            }
            Output::Text => {
                let rate = rate.map_or("unlimited".into(), print::rate);
                print::line(&format!("bandwidth {rate} from now on"));
            }
        }
        Ok(())
    }
}
