//! `transshipd`: the node agent, and the CA in two commands.
#![forbid(unsafe_code)]

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use transship_agent::{
    authority,
    config::{Config, PORT},
    containerd::Containerd,
    node::{Node, Places},
    serve,
    shim::TtrpcShims,
};
use transship_types::NodeName;

const EXAMPLES: &str = "\
Two nodes that trust each other:
  transshipd init-ca
  transshipd issue node-a --address 10.0.0.1:7430
  transshipd issue node-b --address 10.0.0.2:7430
Copy each node's directory to /etc/transship there, name the peer in
/etc/transship/config.toml, and start transshipd.

Files:
  /etc/transship/config.toml   configuration (see `transshipd --help`)
  /run/transship/agent.sock    control socket for `transship`
  /var/lib/transship           records of migrations

Environment:
  RUST_LOG                     what is logged, e.g. debug (default: info)
  TRANSSHIP_CRIU               the CRIU to use instead of the first in PATH";

/// Moves running containers between nodes: the agent of one node.
///
/// Without a subcommand it serves: it listens on one TCP port for other nodes
/// and on a local socket for `transship`. The configuration file is TOML:
///
///   listen = "0.0.0.0:7430"
///   allow = ["node-b"]            # default: every node of the CA
///   [credentials]                 # default: beside the configuration file
///   ca = "/etc/transship/ca.pem"
///   certificate = "/etc/transship/node.pem"
///   key = "/etc/transship/node.key"
///   [peers.node-b]
///   address = "10.0.0.2:7430"
///   [containerd]
///   address = "/run/containerd/containerd.sock"
///   [limits]
///   memory_reserve_mib = 64
///   disk_reserve_mib = 256
///   connections = 64
#[derive(Parser)]
#[command(name = "transshipd", version, verbatim_doc_comment, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Subcommand)]
enum Command {
    /// Serve (the default).
    Serve(Serve),
    /// Make a CA: ca.pem and ca.key (mode 0600).
    InitCa {
        /// Where the CA lives.
        #[arg(long, default_value = "/etc/transship/ca")]
        dir: PathBuf,
    },
    /// Issue a node's certificate and key: ca.pem, node.pem, node.key.
    Issue {
        /// The node's name: a-z, 0-9 and '-'.
        node: NodeName,
        /// Where the CA lives.
        #[arg(long, default_value = "/etc/transship/ca")]
        dir: PathBuf,
        /// Where the node's files go (default: a directory named after the
        /// node, beside the CA's files).
        #[arg(long)]
        out: Option<PathBuf>,
        /// Where the node will listen, for the configuration of its peers.
        #[arg(long, value_name = "HOST:PORT")]
        address: Vec<String>,
    },
}

/// Flags win over the configuration file.
#[derive(Args)]
struct Serve {
    /// Configuration file (default: /etc/transship/config.toml, if it exists).
    #[arg(long)]
    config: Option<PathBuf>,
    /// This node's name; must be the one its certificate carries.
    #[arg(long)]
    node: Option<NodeName>,
    /// Where to listen for other nodes.
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// containerd's socket.
    #[arg(long, value_name = "PATH")]
    containerd: Option<PathBuf>,
    /// The CA's certificate.
    #[arg(long, value_name = "PEM")]
    ca: Option<PathBuf>,
    /// This node's certificate.
    #[arg(long, value_name = "PEM")]
    certificate: Option<PathBuf>,
    /// Its key.
    #[arg(long, value_name = "PEM")]
    key: Option<PathBuf>,
}

fn main() -> ExitCode {
    match begin(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With its causes, and without a backtrace: most of these are
            // about files.
            eprintln!("transshipd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn begin(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Some(Command::InitCa { dir }) => init_ca(&dir),
        Some(Command::Issue { node, dir, out, address }) => {
            let out = out.unwrap_or_else(|| dir.join(node.as_str()));
            issue(&dir, &node, &out, &address)
        }
        Some(Command::Serve(flags)) => run(flags),
        None => run(cli.serve),
    }
}

fn init_ca(dir: &std::path::Path) -> anyhow::Result<()> {
    authority::init(dir)?;
    println!("Made a CA in {0}. Its key, {0}/ca.key, stays on this machine.", dir.display());
    println!("Next, for each node: transshipd issue NODE --address HOST:{PORT}");
    Ok(())
}

fn issue(
    dir: &std::path::Path,
    node: &NodeName,
    out: &std::path::Path,
    addresses: &[String],
) -> anyhow::Result<()> {
    for address in addresses {
        anyhow::ensure!(
            transship_agent::config::is_address(address),
            "the address {address:?} is not of the form HOST:PORT"
        );
    }
    authority::issue(dir, node, out)?;
    println!("Made the certificate of {node}. Next: copy the files of {} to", out.display());
    println!("/etc/transship/ on {node}, and start transshipd there.");
    for address in addresses {
        println!("\nFor /etc/transship/config.toml on its peers:\n");
        println!("[peers.{node}]\naddress = \"{address}\"");
    }
    Ok(())
}

#[tokio::main]
async fn run(flags: Serve) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        .init();

    let config = configured(flags)?;
    let daemon = Arc::new(Containerd::at(&config.containerd.address));
    let node = Node::new(config, Places::default(), daemon, Arc::new(TtrpcShims))?;
    let mut terminate = signal(SignalKind::terminate()).context("waiting for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("waiting for SIGINT")?;
    let serving = serve::open(node).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    serving.close().await;
    Ok(())
}

fn configured(flags: Serve) -> anyhow::Result<Config> {
    let mut config = Config::load(flags.config.as_deref())?;
    config.node = flags.node.or(config.node);
    config.listen = flags.listen.unwrap_or(config.listen);
    config.containerd.address = flags.containerd.unwrap_or(config.containerd.address);
    let credentials = &mut config.credentials;
    credentials.ca = flags.ca.unwrap_or(credentials.ca.clone());
    credentials.certificate = flags.certificate.unwrap_or(credentials.certificate.clone());
    credentials.key = flags.key.unwrap_or(credentials.key.clone());
    Ok(config)
}
