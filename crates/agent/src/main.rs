//! `transshipd`: the node agent, and the CA in two commands.
#![forbid(unsafe_code)]

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::util::SubscriberInitExt;
use transship_agent::{
    authority::{self, Member},
    config::{Config, PORT},
    containerd::Containerd,
    failure::chain,
    logging,
    node::{Node, Places},
    serve,
    shim::TtrpcShims,
};
use transship_types::NodeName;

const EXAMPLES: &str = "\
Two nodes that trust each other:
  transshipd init-ca
  transshipd issue node-a@10.0.0.1:7430 node-b@10.0.0.2:7430
Copy what is in /etc/transship/ca/node-a to /etc/transship on node-a, and so
for node-b, and start transshipd there.

Files:
  /etc/transship/config.toml   configuration (see `transshipd --help`)
  /run/transship/agent.sock    control socket for `transship`
  /var/lib/transship           records of migrations

Signals:
  SIGHUP                       read certificates, key and revocation list again

Environment:
  RUST_LOG                     what is logged, e.g. debug (default: info)
  TRANSSHIP_CRIU               the CRIU to use instead of the first in PATH";

/// Moves running containers between nodes: the agent of one node.
///
/// Without a subcommand it serves: it listens on one TCP port for other nodes
/// and on a local socket for `transship`. The configuration file is TOML:
///
///   node = "node-a"               # default: as the certificate says
///   listen = "0.0.0.0:7430"
///   receive_from = ["node-b"]     # default: every node of the CA
///   send_to = ["rack1-*"]         # default: every node of the CA
///   runtimes = ["io.containerd.transship.v2", "io.containerd.runc.v2-transship"]
///   [credentials]                 # default: these
///   ca = "/etc/transship/ca.pem"
///   certificate = "/etc/transship/node.pem"
///   key = "/etc/transship/node.key"
///   crl = "/etc/transship/crl.pem"     # default: if it is there
///   [peers.node-b]
///   address = "10.0.0.2:7430"
///   [control]
///   group = "movers"              # default: root alone
///   [containerd]
///   address = "/run/containerd/containerd.sock"
///   [limits]
///   memory_reserve_mib = 64
///   disk_reserve_mib = 256
///   connections = 64
///   [memory]                      # of migrations from here; flags win
///   max_pause = "100ms"
///   throttle = "auto"             # or "never"
///   post_copy = "never"           # or "auto", "always"
///   lanes = 2
///   bandwidth = "none"            # or "1Gbit/s", "100MiB/s"
///   compress = "auto"             # or "never", "lz4", "zstd"
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
    /// Issue certificates: for each node a directory to copy to /etc/transship
    /// there, with ca.pem, node.pem, node.key and, if addresses are given,
    /// config.toml.
    Issue {
        /// Names (a-z, 0-9 and '-'), with the address where each will listen.
        #[arg(required = true, value_name = "NODE[@HOST:PORT]")]
        nodes: Vec<Member>,
        /// Where the CA lives.
        #[arg(long, default_value = "/etc/transship/ca")]
        dir: PathBuf,
        /// Where the files of a single node go (default: a directory named
        /// after the node, beside the CA's files).
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Revoke certificates: all that were issued to a node, or one.
    Revoke {
        /// A node's name, or a file with a certificate.
        #[arg(required = true, value_name = "NODE|FILE")]
        whose: Vec<String>,
        /// Where the CA lives.
        #[arg(long, default_value = "/etc/transship/ca")]
        dir: PathBuf,
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
        Some(Command::Issue { nodes, dir, out }) => issue(&nodes, &dir, out.as_deref()),
        Some(Command::Revoke { whose, dir }) => revoke(&whose, &dir),
        Some(Command::Serve(flags)) => run(flags),
        None => run(cli.serve),
    }
}

fn init_ca(dir: &Path) -> anyhow::Result<()> {
    authority::init(dir)?;
    println!("Made a CA in {0}. Its key, {0}/ca.key, stays on this machine.", dir.display());
    println!("Next: transshipd issue NODE@HOST:{PORT} NODE@HOST:{PORT} …");
    Ok(())
}

fn issue(nodes: &[Member], dir: &Path, out: Option<&Path>) -> anyhow::Result<()> {
    anyhow::ensure!(
        out.is_none() || nodes.len() == 1,
        "--out is for one node; without it each gets a directory of its own in {}",
        dir.display()
    );
    for Member { node, .. } in nodes {
        let twice = nodes.iter().filter(|other| other.node == *node).count() > 1;
        anyhow::ensure!(!twice, "the node {node} is named twice");
    }
    for member in nodes {
        let node = &member.node;
        let out = out.map_or_else(|| dir.join(node.as_str()), Path::to_owned);
        authority::issue(dir, node, &out)?;
        if nodes.iter().any(|member| member.address.is_some()) {
            authority::write_config(&out, member, nodes)?;
        }
        println!("{node}: copy what is in {} to /etc/transship there", out.display());
    }
    println!("Then start transshipd on each node.");
    Ok(())
}

fn revoke(whose: &[String], dir: &Path) -> anyhow::Result<()> {
    for whose in whose {
        for revoked in authority::revoke(dir, whose)? {
            println!("Revoked {revoked}.");
        }
    }
    println!("Copy {}/crl.pem to /etc/transship on every node, and", dir.display());
    println!("`systemctl reload transshipd` there: it holds where it has been read.");
    Ok(())
}

#[tokio::main]
async fn run(flags: Serve) -> anyhow::Result<()> {
    let asked = std::env::var("RUST_LOG").ok();
    logging::to(io::stderr, io::stderr().is_terminal(), asked.as_deref()).init();

    let config = configured(flags)?;
    let daemon = Arc::new(Containerd::at(&config.containerd.address));
    let node = Node::new(config, Places::default(), daemon, Arc::new(TtrpcShims))?;
    let mut terminate = signal(SignalKind::terminate()).context("waiting for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("waiting for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("waiting for SIGHUP")?;
    let serving = serve::open(node.clone()).await?;
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => renew(&node),
        }
    }
    serving.close().await;
    Ok(())
}

fn renew(node: &Node) {
    match node.renew() {
        Ok(()) => {
            let until = node.trust().until().date();
            tracing::info!(%until, "certificate and revocation list were read again");
        }
        Err(error) => {
            let error = chain(&error);
            tracing::error!(error, "what was read before stays in use");
        }
    }
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
