//! Names from outside, checked once. Each says what it may contain, and
//! nothing downstream needs to look again.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroize;

/// A name that cannot be what it claims to be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what} {text:?} is not valid: {why}")]
pub struct InvalidName {
    what: &'static str,
    text: String,
    why: &'static str,
}

fn invalid(what: &'static str, text: &str, why: &'static str) -> InvalidName {
    // A hostile name may be long; the error must not be.
    let text = text.chars().take(80).collect();
    InvalidName { what, text, why }
}

/// containerd's own limit for ids and namespaces (`identifiers.Validate`).
const IDENTIFIER_MAX: usize = 76;

/// A container within its namespace, by containerd's rules for identifiers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContainerKey {
    namespace: String,
    id: String,
}

impl ContainerKey {
    pub fn new(namespace: &str, id: &str) -> Result<Self, InvalidName> {
        check_identifier("namespace", namespace)?;
        check_identifier("container", id)?;
        Ok(Self { namespace: namespace.into(), id: id.into() })
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Display for ContainerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.id)
    }
}

fn check_identifier(what: &'static str, text: &str) -> Result<(), InvalidName> {
    if text.is_empty() || text.len() > IDENTIFIER_MAX {
        return Err(invalid(what, text, "it must have 1 to 76 characters"));
    }
    let groups_hold = text
        .split(['-', '.', '_'])
        .all(|group| !group.is_empty() && group.bytes().all(|b| b.is_ascii_alphanumeric()));
    if groups_hold {
        Ok(())
    } else {
        Err(invalid(what, text, "only letters and digits, joined by single '-', '.' or '_'"))
    }
}

/// One attempt to move one container.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MigrationId(String);

/// The single-use right to arrive: binds a source's connection to the
/// container that waits for it. A secret while it is good for anything: errors
/// and `Debug` do not show it, and dropping it wipes it out.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ticket(String);

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket(…)")
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// 32 hex digits; `$shown` is what an error may show of a text that is not.
macro_rules! hex_name {
    ($name:ident, $what:literal, $shown:expr) => {
        impl $name {
            /// From 16 random bytes.
            pub fn from_random(bytes: [u8; 16]) -> Self {
                Self(bytes.iter().map(|b| format!("{b:02x}")).collect())
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                let hex = text.len() == 32
                    && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
                let shown: fn(&str) -> &str = $shown;
                if hex {
                    Ok(Self(text.into()))
                } else {
                    Err(invalid($what, shown(text), "32 hex digits wanted"))
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;

            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(mut name: $name) -> String {
                std::mem::take(&mut name.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

hex_name!(MigrationId, "migration", |text| text);
hex_name!(Ticket, "ticket", |_| "…");

/// How often a container has changed hands: a higher epoch fences a lower one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Epoch(pub u64);

/// A node, as its certificate names it: one DNS label, so that
/// `NODE.transship.internal` can stand in a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

impl NodeName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name its agent answers to in TLS.
    pub fn agent_dns(&self) -> String {
        format!("{}.{DOMAIN}", self.0)
    }

    /// The name a waiting shim answers to: it tells the agent, before any
    /// byte is decrypted, which shim gets the connection.
    pub fn ticket_dns(&self, ticket: &Ticket) -> String {
        format!("{ticket}.{}.{DOMAIN}", self.0)
    }
}

/// `.internal` is reserved for private use (ICANN, 2024): it never resolves.
pub const DOMAIN: &str = "transship.internal";

impl FromStr for NodeName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if text.is_empty() || text.len() > 63 {
            return Err(invalid("node", text, "it must have 1 to 63 characters"));
        }
        if !text.bytes().all(inner) || text.starts_with('-') || text.ends_with('-') {
            return Err(invalid("node", text, "only a-z, 0-9 and '-' inside"));
        }
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for NodeName {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> String {
        name.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_follow_containerd() {
        let long = "a".repeat(77);
        for (text, good) in [
            ("redis", true),
            ("a.b-c_d", true),
            ("k8s.io", true),
            ("", false),
            ("-a", false),
            ("a--b", false),
            ("../up", false),
            ("a/b", false),
            (long.as_str(), false),
        ] {
            assert_eq!(ContainerKey::new("default", text).is_ok(), good, "{text:?}");
            assert_eq!(ContainerKey::new(text, "redis").is_ok(), good, "{text:?}");
        }
    }

    #[test]
    fn a_ticket_is_one_dns_label() {
        let ticket = Ticket::from_random([0xab; 16]);
        assert_eq!(ticket.as_str().len(), 32);
        let node: NodeName = "node-a".parse().unwrap();
        assert_eq!(node.ticket_dns(&ticket), format!("{ticket}.node-a.transship.internal"));
        let wrong = "AB".repeat(16).parse::<Ticket>().unwrap_err();
        assert!(!wrong.to_string().contains("AB"), "{wrong}");
        assert!(!format!("{ticket:?}").contains("ab"));
        assert!("a.b".parse::<NodeName>().is_err());
    }
}
