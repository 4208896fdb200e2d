//! Why a connection did not come about or broke, told apart as far as the
//! remedies differ: not there, not trusted, not one of us, or broken.

use std::{io, path::PathBuf};

use rustls::{AlertDescription as Alert, CertificateError, Error};
use rustls_pki_types::UnixTime;
use time::{Date, OffsetDateTime};
use transship_types::{Code, NodeName};
use transship_wire::WireError;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("{} cannot be used: {why}", path.display())]
    Credentials { path: PathBuf, why: String },
    #[error("{address} cannot be reached")]
    Unreachable {
        address: String,
        #[source]
        source: io::Error,
    },
    /// We refuse the peer's certificate.
    #[error("the certificate of {peer} is not trusted here")]
    PeerNotTrusted {
        peer: String,
        #[source]
        source: Error,
    },
    /// The peer refuses ours.
    #[error("{peer} does not trust this node's certificate")]
    NotTrustedByPeer {
        peer: String,
        #[source]
        source: Error,
    },
    /// Theirs or ours, as seen here.
    #[error("the certificate of {peer} expired on {until}")]
    Expired {
        peer: String,
        /// Whose it is, if that is known: a name in a certificate that did not
        /// pass proves nothing.
        node: Option<NodeName>,
        until: Date,
    },
    /// By our list.
    #[error("the certificate of {peer} has been revoked")]
    Revoked { peer: String, node: Option<NodeName> },
    #[error("the certificate of {peer} {why}")]
    Name { peer: String, why: String },
    #[error("{peer} does not speak TLS 1.3 as a node does: {why}")]
    NotANode { peer: String, why: String },
    #[error("{peer} speaks version {theirs} of the protocol, this node speaks {ours}")]
    Version { peer: String, theirs: u32, ours: u32 },
    #[error("{what} took longer than {seconds} s")]
    Timeout { what: String, seconds: u64 },
    #[error("the connection with {peer} broke")]
    Broken {
        peer: String,
        #[source]
        source: WireError,
    },
    #[error("the arrival was refused: {0}")]
    Arrival(String),
    #[error("{what} failed")]
    Socket {
        what: String,
        #[source]
        source: io::Error,
    },
}

impl LinkError {
    pub fn code(&self) -> Code {
        match self {
            LinkError::Unreachable { .. } => Code::Unreachable,
            LinkError::Credentials { .. }
            | LinkError::PeerNotTrusted { .. }
            | LinkError::NotTrustedByPeer { .. }
            | LinkError::Expired { .. }
            | LinkError::Revoked { .. }
            | LinkError::Name { .. } => Code::NotTrusted,
            LinkError::NotANode { .. } | LinkError::Version { .. } => Code::Protocol,
            LinkError::Timeout { .. } => Code::Timeout,
            LinkError::Broken { source: WireError::Deadline(_), .. } => Code::Timeout,
            LinkError::Broken { source, .. } => match source {
                WireError::Closed | WireError::Truncated | WireError::Io(_) => Code::Link,
                _ => Code::Malformed,
            },
            LinkError::Arrival(_) => Code::Cancelled,
            LinkError::Socket { .. } => Code::Link,
        }
    }

    /// What would help, as one sentence.
    pub fn remedy(&self) -> String {
        let remedy = match self {
            LinkError::Expired { node, .. } => return renewal(node.as_ref()),
            LinkError::Revoked { node, .. } => {
                let renewal = renewal(node.as_ref());
                return format!("if it shall be a node again, {renewal}");
            }
            LinkError::Unreachable { .. } => {
                "see that transshipd runs there and that its port is open"
            }
            LinkError::Credentials { .. } => {
                "issue this node's certificate again with `transshipd issue`"
            }
            LinkError::PeerNotTrusted { .. } | LinkError::NotTrustedByPeer { .. } => {
                "both nodes need valid certificates of the same CA (`transshipd issue`)"
            }
            LinkError::Name { .. } => {
                "see that the node's name and its address in the configuration belong together"
            }
            LinkError::NotANode { .. } => "see that the address is that of a transshipd",
            LinkError::Version { .. } => "run the same version of Transship on both nodes",
            LinkError::Timeout { .. } | LinkError::Broken { .. } => {
                "see the network and the peer's log, then try again"
            }
            LinkError::Arrival(_) | LinkError::Socket { .. } => "see the log of transshipd",
        };
        remedy.into()
    }

    /// Whose certificate it is, once that is known.
    pub(crate) fn of(mut self, name: &NodeName) -> Self {
        if let LinkError::Expired { node, .. } | LinkError::Revoked { node, .. } = &mut self {
            *node = Some(name.clone());
        }
        self
    }

    /// A certificate that does not pass here.
    pub(crate) fn of_certificate(peer: &str, source: Error) -> Self {
        let peer = peer.to_string();
        let Error::InvalidCertificate(why) = &source else {
            return LinkError::PeerNotTrusted { peer, source };
        };
        let date = |until: UnixTime| {
            let seconds = until.as_secs().try_into().ok()?;
            OffsetDateTime::from_unix_timestamp(seconds).ok().map(OffsetDateTime::date)
        };
        match why {
            CertificateError::Revoked => LinkError::Revoked { peer, node: None },
            CertificateError::ExpiredContext { not_after, .. } => match date(*not_after) {
                Some(until) => LinkError::Expired { peer, node: None, until },
                None => LinkError::PeerNotTrusted { peer, source },
            },
            _ => LinkError::PeerNotTrusted { peer, source },
        }
    }

    /// What went wrong with `peer` in or after the handshake. A certificate
    /// that the *server* refuses shows at the client only when it reads.
    pub(crate) fn from_wire(peer: &str, error: WireError) -> Self {
        match error {
            WireError::Io(error) => Self::from_tls(peer, error),
            source => LinkError::Broken { peer: peer.into(), source },
        }
    }

    pub(crate) fn from_tls(peer: &str, error: io::Error) -> Self {
        let peer = peer.to_string();
        let tls = error.get_ref().and_then(|e| e.downcast_ref::<Error>()).cloned();
        match tls {
            Some(
                source @ (Error::InvalidCertificate(_)
                | Error::InvalidCertRevocationList(_)
                | Error::NoCertificatesPresented),
            ) => Self::of_certificate(&peer, source),
            Some(
                source @ Error::AlertReceived(
                    Alert::UnknownCA
                    | Alert::BadCertificate
                    | Alert::CertificateExpired
                    | Alert::CertificateRevoked
                    | Alert::CertificateUnknown
                    | Alert::CertificateRequired
                    | Alert::UnsupportedCertificate
                    | Alert::AccessDenied
                    | Alert::DecryptError,
                ),
            ) => LinkError::NotTrustedByPeer { peer, source },
            Some(Error::AlertReceived(Alert::UnrecognisedName)) => {
                LinkError::Name { peer, why: "was expected, and another node answers there".into() }
            }
            Some(
                other @ (Error::InvalidMessage(_)
                | Error::PeerIncompatible(_)
                | Error::AlertReceived(_)),
            ) => LinkError::NotANode { peer, why: other.to_string() },
            _ => LinkError::Broken { peer, source: error.into() },
        }
    }
}

/// How a node gets another certificate.
pub fn renewal(node: Option<&NodeName>) -> String {
    let node = node.map_or("NODE", NodeName::as_str);
    format!(
        "run `transshipd issue {node} --out DIR` where the CA is, copy what is in DIR to \
         /etc/transship on {node}, and `systemctl reload transshipd` there"
    )
}
