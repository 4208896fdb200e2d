//! Who we are and whom we believe: one CA, one certificate per node.
//!
//! A certificate of node `a` carries the DNS names `a.transship.internal` and
//! `*.a.transship.internal`; the second lets a shim of the node answer to
//! `TICKET.a.transship.internal`. Verification is ordinary webpki; the only
//! thing read from a certificate beyond that is the node's name.

use std::{path::Path, sync::Arc, time::SystemTime};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::ring,
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime, pem::PemObject,
};
use time::OffsetDateTime;
use transship_types::{DOMAIN, NodeName};
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::{Credentials, LinkError, Pem};

/// Credentials that were read and found usable.
#[derive(Clone)]
pub struct Trust {
    node: NodeName,
    until: OffsetDateTime,
    crl_until: Option<OffsetDateTime>,
    chain: Arc<[CertificateDer<'static>]>,
    clients: Arc<dyn ClientCertVerifier>,
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
}

impl Trust {
    /// Reads the files (blocking, but a few kilobytes).
    pub fn load(files: &Credentials) -> Result<Trust, LinkError> {
        Self::new(&Pem::read(files)?)
    }

    pub fn new(pem: &Pem) -> Result<Trust, LinkError> {
        let files = &pem.files;
        let roots = roots(&files.ca, &pem.ca)?;
        let chain = certificates(&files.certificate, &pem.certificate)?;
        let (crls, crl_until) = match (&files.crl, &pem.crl) {
            (Some(path), Some(bytes)) => revocations(path, bytes)?,
            _ => Default::default(),
        };
        // `certificates` never returns an empty list.
        let node = node_of(&chain[0]).map_err(|why| unusable(&files.certificate, why))?;
        let until = not_after(&chain[0]).map_err(|why| unusable(&files.certificate, why))?;

        // Every certificate of a chain is looked up, and one whose issuer has
        // no list is refused: a list that was given by mistake must not pass
        // for one that names nobody. One that is out of date holds on: what
        // it revokes stays revoked, and a CA that is away stops no node.
        let crl = files.crl.as_ref().unwrap_or(&files.ca);
        let own = Arc::new(SingleCertAndKey::from(own(files, pem, &chain)?));
        let provider = Arc::new(ring::default_provider());
        let servers = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .with_crls(crls.iter().cloned())
            .build()
            .map_err(|e| unusable(crl, e))?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .with_crls(crls)
            .build()
            .map_err(|e| unusable(crl, e))?;

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| unusable(&files.ca, e))?
            .with_webpki_verifier(servers)
            .with_client_cert_resolver(own.clone());
        // Every connection proves both certificates anew: a resumed session
        // would outlive the certificate that began it.
        client.resumption = Resumption::disabled();

        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| unusable(&files.ca, e))?
            .with_client_cert_verifier(clients.clone())
            .with_cert_resolver(own);
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        Ok(Trust {
            node,
            until,
            crl_until,
            chain: chain.into(),
            clients,
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// This node, as its own certificate names it.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// When this node's certificate expires.
    pub fn until(&self) -> OffsetDateTime {
        self.until
    }

    /// When the CA meant to have another revocation list out.
    pub fn crl_until(&self) -> Option<OffsetDateTime> {
        self.crl_until
    }

    /// Whether this node's certificate would do for a peer with the same CA
    /// and the same revocation list, now.
    pub fn vet(&self) -> Result<(), LinkError> {
        self.not_expired()?;
        let verified =
            self.clients.verify_client_cert(&self.chain[0], &self.chain[1..], UnixTime::now());
        let node = &self.node;
        verified.map(drop).map_err(|source| {
            LinkError::of_certificate(&format!("this node, {node},"), source).of(node)
        })
    }

    /// Said before a peer is bothered, who could not say it as well.
    pub(crate) fn not_expired(&self) -> Result<(), LinkError> {
        if OffsetDateTime::from(SystemTime::now()) <= self.until {
            return Ok(());
        }
        let node = self.node.clone();
        let peer = format!("this node, {node},");
        Err(LinkError::Expired { peer, node: Some(node), until: self.until.date() })
    }
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trust").field("node", &self.node).finish_non_exhaustive()
    }
}

/// What this node shows. The key is wiped out once the library has made its
/// own of it, which it keeps for as long as connections may begin.
fn own(
    files: &Credentials,
    pem: &Pem,
    chain: &[CertificateDer<'static>],
) -> Result<CertifiedKey, LinkError> {
    let unusable_key = |why: String| unusable(&files.key, why);
    let key = PrivateKeyDer::from_pem_slice(&pem.key).map_err(|e| unusable_key(e.to_string()))?;
    let key = Zeroizing::new(key);
    let signing = ring::sign::any_supported_type(&key).map_err(|e| unusable_key(e.to_string()))?;
    let own = CertifiedKey::new(chain.to_vec(), signing);
    own.keys_match().map_err(|e| unusable_key(e.to_string()))?;
    Ok(own)
}

fn roots(path: &Path, pem: &[u8]) -> Result<Arc<RootCertStore>, LinkError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        roots.add(certificate).map_err(|e| unusable(path, e))?;
    }
    Ok(Arc::new(roots))
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, LinkError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| unusable(path, e))?;
    if found.is_empty() {
        return Err(unusable(path, "it holds no certificate"));
    }
    Ok(found)
}

type Revocations = (Vec<CertificateRevocationListDer<'static>>, Option<OffsetDateTime>);

/// The lists, and when the first of them is out of date.
fn revocations(path: &Path, pem: &[u8]) -> Result<Revocations, LinkError> {
    let lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| unusable(path, e))?;
    if lists.is_empty() {
        return Err(unusable(path, "it holds no revocation list"));
    }
    let mut until = None;
    for list in &lists {
        let (_, parsed) =
            CertificateRevocationList::from_der(list).map_err(|e| unusable(path, e))?;
        let next = parsed.next_update().map(|next| next.to_datetime());
        until = match (until, next) {
            (Some(one), Some(other)) => Some(std::cmp::min(one, other)),
            (one, other) => one.or(other),
        };
    }
    Ok((lists, until))
}

fn not_after(certificate: &CertificateDer<'_>) -> Result<OffsetDateTime, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
    Ok(parsed.validity().not_after.to_datetime())
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
