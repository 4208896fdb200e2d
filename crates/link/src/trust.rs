//! Who we are and whom we believe: one CA, one certificate per node.
//!
//! A certificate of node `a` carries the DNS names `a.transship.internal` and
//! `*.a.transship.internal`; the second lets a shim of the node answer to
//! `TICKET.a.transship.internal`. Verification is ordinary webpki; the only
//! thing read from a certificate beyond that is the node's name.

use std::{path::Path, path::PathBuf, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::ring,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde::{Deserialize, Serialize};
use transship_types::{DOMAIN, NodeName};

use crate::LinkError;

/// PEM files. The certificate's file may hold intermediates after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Credentials that were read and found usable.
#[derive(Clone)]
pub struct Trust {
    node: NodeName,
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
}

impl Trust {
    /// Reads the files (blocking, but a few kilobytes).
    pub fn load(credentials: &Credentials) -> Result<Trust, LinkError> {
        let roots = roots(&credentials.ca)?;
        let chain = certificates(&credentials.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&credentials.key)
            .map_err(|e| unusable(&credentials.key, e))?;
        // `certificates` never returns an empty list.
        let node = node_of(&chain[0]).map_err(|why| unusable(&credentials.certificate, why))?;

        let provider = Arc::new(ring::default_provider());
        let servers = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| unusable(&credentials.ca, e))?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|e| unusable(&credentials.ca, e))?;

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| unusable(&credentials.ca, e))?
            .with_webpki_verifier(servers)
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(|e| unusable(&credentials.key, e))?;
        // Every connection proves both certificates anew: a resumed session
        // would outlive the certificate that began it.
        client.resumption = Resumption::disabled();

        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| unusable(&credentials.ca, e))?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)
            .map_err(|e| unusable(&credentials.key, e))?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        Ok(Trust { node, client: Arc::new(client), server: Arc::new(server) })
    }

    /// This node, as its own certificate names it.
    pub fn node(&self) -> &NodeName {
        &self.node
    }
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trust").field("node", &self.node).finish_non_exhaustive()
    }
}

fn roots(path: &Path) -> Result<Arc<RootCertStore>, LinkError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|e| unusable(path, e))?;
    }
    Ok(Arc::new(roots))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, LinkError> {
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|e| unusable(path, e))?;
    if found.is_empty() {
        return Err(unusable(path, "it holds no certificate"));
    }
    Ok(found)
}

/// The one name of the form `NODE.transship.internal`.
pub(crate) fn node_of(certificate: &CertificateDer<'_>) -> Result<NodeName, String> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|e| e.to_string())?;
    let mut nodes = parsed
        .valid_dns_names()
        .filter_map(|name| name.strip_suffix(DOMAIN)?.strip_suffix('.')?.parse::<NodeName>().ok());
    match (nodes.next(), nodes.next()) {
        (Some(node), None) => Ok(node),
        (None, _) => Err(format!("names no node (NODE.{DOMAIN})")),
        (Some(one), Some(other)) => Err(format!("names two nodes, {one} and {other}")),
    }
}

fn unusable(path: &Path, why: impl ToString) -> LinkError {
    LinkError::Credentials { path: path.into(), why: why.to_string() }
}
