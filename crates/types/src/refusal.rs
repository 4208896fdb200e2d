//! Why something cannot be done, in a form that programs can match and people
//! can act on.

use std::{fmt, str::FromStr};

use serde::{
    Deserialize, Serialize,
    de::{IntoDeserializer, value},
};

/// A stable word for a reason. Programs decide by it, never by the sentence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// No such container, or it has no task.
    UnknownContainer,
    /// The task is not running.
    NotRunning,
    /// The container runs under another shim.
    ForeignRuntime,
    /// No such node in the configuration.
    UnknownNode,
    /// The node cannot be reached.
    Unreachable,
    /// TLS failed, or the certificate names somebody else.
    NotTrusted,
    /// A node that is known, and may not do this.
    NotAllowed,
    /// The peer speaks another protocol version.
    Protocol,
    /// CRIU is missing, too old, or fails its probe.
    Criu,
    /// The target's CPU lacks features that the source has.
    Cpu,
    /// Architecture, page size or kernel do not match.
    Host,
    /// The image is on neither node, or cannot be read.
    Image,
    /// The name is in use on the target.
    NameTaken,
    /// Not enough disk or memory on the target.
    Space,
    /// The container shares the host's network.
    HostNetwork,
    /// A mount that does not exist on the target.
    Mount,
    /// Something inside the container that CRIU cannot dump.
    Unsupported,
    /// Another migration of the same container is under way.
    Busy,
    /// Somebody asked for it.
    Cancelled,
    /// The other side took too long.
    Timeout,
    /// Its memory changes faster than it can be sent.
    NotConverging,
    /// The link broke.
    Link,
    /// CRIU or the OCI runtime failed.
    Runtime,
    /// The daemon (containerd) failed.
    Daemon,
    /// A message that should not be there.
    Malformed,
    /// Our own mistake.
    Internal,
}

impl Code {
    pub fn as_str(self) -> &'static str {
        match self {
            Code::UnknownContainer => "unknown-container",
            Code::NotRunning => "not-running",
            Code::ForeignRuntime => "foreign-runtime",
            Code::UnknownNode => "unknown-node",
            Code::Unreachable => "unreachable",
            Code::NotTrusted => "not-trusted",
            Code::NotAllowed => "not-allowed",
            Code::Protocol => "protocol",
            Code::Criu => "criu",
            Code::Cpu => "cpu",
            Code::Host => "host",
            Code::Image => "image",
            Code::NameTaken => "name-taken",
            Code::Space => "space",
            Code::HostNetwork => "host-network",
            Code::Mount => "mount",
            Code::Unsupported => "unsupported",
            Code::Busy => "busy",
            Code::Cancelled => "cancelled",
            Code::Timeout => "timeout",
            Code::NotConverging => "not-converging",
            Code::Link => "link",
            Code::Runtime => "runtime",
            Code::Daemon => "daemon",
            Code::Malformed => "malformed",
            Code::Internal => "internal",
        }
    }
}

impl FromStr for Code {
    type Err = value::Error;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Self::deserialize(word.into_deserializer())
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A reason and what would help.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub code: Code,
    pub reason: String,
    pub remedy: String,
}

impl Refusal {
    pub fn new(code: Code, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code, reason: reason.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason)?;
        if !self.remedy.is_empty() {
            write!(f, " ({})", self.remedy)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_the_same_word_everywhere() {
        let json = serde_json::to_string(&Code::HostNetwork).unwrap();
        assert_eq!(json, format!("{:?}", Code::HostNetwork.as_str()));
        assert_eq!(Code::HostNetwork.as_str().parse(), Ok(Code::HostNetwork));
        assert!("of-tomorrow".parse::<Code>().is_err());
    }
}
