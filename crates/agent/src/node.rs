//! One node: everything its sessions share.

use std::{fs, io, io::Read, path::PathBuf, sync::Arc};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use transship_api::session::Host;
use transship_link::{Trust, arrivals::Arrivals};
use transship_types::{Code, NodeName, Refusal, paths};

use crate::{
    access,
    book::Book,
    config::{Config, is_address},
    daemon::Daemon,
    failure::{Failure, Step},
    host,
    identity::{Identities, IdentityError},
    shim::Shims,
};

/// Where a node keeps its sockets and records: [`paths`], except in a test
/// with two nodes in one process.
#[derive(Debug, Clone)]
pub struct Places {
    pub runtime: PathBuf,
    pub state: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self { runtime: paths::RUNTIME_DIR.into(), state: paths::STATE_DIR.into() }
    }
}

pub struct Node {
    pub config: Config,
    pub places: Places,
    name: NodeName,
    pub identities: Identities,
    pub daemon: Arc<dyn Daemon>,
    pub shims: Arc<dyn Shims>,
    pub book: Arc<Book>,
    pub arrivals: Arrivals,
    machine: Machine,
    /// No new session begins, and those before their commit end.
    pub shutdown: CancellationToken,
    /// Sessions; waited for before the process ends.
    pub tasks: TaskTracker,
}

impl Node {
    pub fn new(
        config: Config,
        places: Places,
        daemon: Arc<dyn Daemon>,
        shims: Arc<dyn Shims>,
    ) -> Result<Arc<Node>, NodeError> {
        let copies = places.runtime.join("credentials");
        let identities = Identities::open(&config.credentials, &copies)?;
        let identity = identities.current();
        let name = identity.trust.node().clone();
        if let Some(said) = config.node.as_ref().filter(|said| **said != name) {
            return Err(NodeError::Name { said: said.clone(), proved: name });
        }
        let records = places.state.join("migrations");
        let book =
            Book::open(&records).map_err(|source| NodeError::Records { path: records, source })?;
        Ok(Arc::new(Node {
            arrivals: Arrivals::new(identity.files.clone()),
            machine: Machine::This,
            name,
            identities,
            config,
            places,
            daemon,
            shims,
            book,
            shutdown: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }))
    }

    pub fn name(&self) -> &NodeName {
        &self.name
    }

    /// For a connection that begins now.
    pub fn trust(&self) -> Trust {
        self.identities.current().trust.clone()
    }

    /// Reads certificates, key and revocation list again. Sessions that are
    /// under way go on with what they began with.
    pub fn renew(&self) -> Result<(), IdentityError> {
        let identity = self.identities.renew()?;
        self.arrivals.renew(identity.files.clone());
        Ok(())
    }

    /// What this machine is, asked anew: CRIU may have been replaced.
    pub async fn host(&self) -> Host {
        match &self.machine {
            Machine::This => host::describe().await,
            #[cfg(test)]
            Machine::Like(host) => host.clone(),
        }
    }

    /// Does as if the machine were another one, so that a test needs no CRIU.
    #[cfg(test)]
    pub fn on(mut self: Arc<Node>, host: Host) -> Arc<Node> {
        Arc::get_mut(&mut self).expect("just made").machine = Machine::Like(host);
        self
    }

    pub fn is_ours(&self, runtime: &str) -> bool {
        self.config.runtimes.iter().any(|name| name == runtime)
    }

    /// Why nothing is taken from `peer`.
    pub fn refuses(&self, peer: &NodeName) -> Option<Refusal> {
        access::receive(self.name(), &self.config.receive_from, peer)
    }

    /// A node of the configuration, or `NODE@HOST:PORT`, to which containers
    /// may be sent from here.
    pub fn find(&self, text: &str) -> Step<Destination> {
        let found = match text.split_once('@') {
            Some((name, address)) if is_address(address) => {
                name.parse().ok().map(|name| Destination { name, address: address.into() })
            }
            Some(_) => None,
            None => text.parse::<NodeName>().ok().and_then(|name| {
                let address = self.config.peers.get(&name)?.address.clone();
                Some(Destination { name, address })
            }),
        };
        let found = found.ok_or_else(|| {
            let known: Vec<_> = self.config.peers.keys().map(NodeName::as_str).collect();
            let known = if known.is_empty() { "none".into() } else { known.join(", ") };
            let shown: String = text.chars().take(80).collect();
            Failure::new(
                Code::UnknownNode,
                format!("there is no node {shown:?}; known are: {known}"),
                format!(
                    "add [peers.NODE] to {} on {}, or name it NODE@HOST:PORT",
                    paths::CONFIG,
                    self.name()
                ),
            )
        })?;
        if found.name == *self.name() {
            return Err(Failure::new(
                Code::UnknownNode,
                format!("{} is this node itself", found.name),
                "name another node",
            ));
        }
        match access::send(self.name(), &self.config.send_to, &found.name) {
            Some(refusal) => Err(Failure(vec![refusal])),
            None => Ok(found),
        }
    }
}

enum Machine {
    This,
    #[cfg(test)]
    Like(Host),
}

#[derive(Debug, Clone)]
pub struct Destination {
    pub name: NodeName,
    pub address: String,
}

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the configuration names this node {said}, its certificate {proved}")]
    Name { said: NodeName, proved: NodeName },
    #[error("the records in {} cannot be used", path.display())]
    Records {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// 16 bytes that nobody can guess.
pub fn random() -> Step<[u8; 16]> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut urandom| urandom.read_exact(&mut bytes))
        .map_err(|e| Failure::new(Code::Internal, format!("reading /dev/urandom: {e}"), ""))?;
    Ok(bytes)
}
