//! `transship`: the command line. One file per command; each asks the node
//! agent over its control socket and prints the answer.
#![forbid(unsafe_code)]

mod cancel;
mod check;
mod client;
mod error;
mod limit;
mod migrate;
mod plan;
mod print;
mod progress;
mod ps;
mod report;
mod resolve;
mod status;
mod tuning;
mod version;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};
use transship_types::paths;

const EXAMPLES: &str = "\
Examples:
  transship check --to node-b            can containers go there?
  transship ps                           what can be moved?
  transship plan redis --to node-b       what would it be like?
  transship migrate redis --to node-b    move it
  transship status                       what was moved?

Exit status:
  0  done
  1  it was not done; the reason and a remedy are on standard error
  2  the command line is wrong
  3  in doubt: the container is stopped here until the target has answered

With --output json an error is an object on standard output:
  {\"error\": {\"code\": \"…\", \"reason\": \"…\", \"remedy\": \"…\"}}

Environment:
  TRANSSHIP_SOCKET   the agent's control socket";

/// Moves running containers from this node to another.
///
/// Talks to transshipd on this node, which must run here and on the target.
/// Needs the rights of root.
#[derive(Parser)]
#[command(name = "transship", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
pub struct Common {
    /// How results are printed.
    #[arg(long, global = true, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// The agent's control socket.
    #[arg(long, global = true, env = "TRANSSHIP_SOCKET", default_value = paths::AGENT_SOCKET)]
    pub socket: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Text,
    Json,
}

#[derive(Subcommand)]
enum Command {
    Migrate(migrate::Migrate),
    Plan(plan::Plan),
    Ps(ps::Ps),
    Status(status::Status),
    Cancel(cancel::Cancel),
    Resolve(resolve::Resolve),
    Limit(limit::Limit),
    Check(check::Check),
    Version(version::Version),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Cli { command, common } = Cli::parse();
    let done = match command {
        Command::Migrate(command) => command.run(&common).await,
        Command::Plan(command) => command.run(&common).await,
        Command::Ps(command) => command.run(&common).await,
        Command::Status(command) => command.run(&common).await,
        Command::Cancel(command) => command.run(&common).await,
        Command::Resolve(command) => command.run(&common).await,
        Command::Limit(command) => command.run(&common).await,
        Command::Check(command) => command.run(&common).await,
        Command::Version(command) => command.run(&common).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print::error(common.output, &error);
            error.exit_code()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_is_written_is_understood() {
        let cli = Cli::try_parse_from([
            "transship",
            "migrate",
            "redis",
            "--to",
            "b@10.0.0.2:7430",
            "--output",
            "json",
            "--keep",
            "--timeout",
            "90",
        ])
        .unwrap();
        assert!(cli.common.output == Output::Json);
        let Command::Migrate(migrate) = cli.command else { panic!() };
        assert_eq!((migrate.namespace.as_str(), migrate.keep), ("default", true));
        for wrong in [
            &["transship", "migrate", "redis"][..],
            &["transship"],
            &["transship", "move"],
            &["transship", "resolve", "x"],
            &["transship", "resolve", "x", "--run-here", "--discard"],
        ] {
            assert!(Cli::try_parse_from(wrong).is_err(), "{wrong:?}");
        }
        assert!(Cli::try_parse_from(["transship", "ps", "-A", "-n", "x"]).is_err());
    }
}
