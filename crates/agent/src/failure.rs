//! Errors on their way to people: every reason with a code and a remedy.

use std::error::Error;

use transship_api::{control, session};
use transship_link::LinkError;
use transship_types::{Code, Refusal};
use transship_wire::WireError;

use crate::{daemon::DaemonError, shim::ShimError};

/// Why a step did not succeed: one reason or, after a preflight, several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure(pub Vec<Refusal>);

pub type Step<T> = Result<T, Failure>;

impl Failure {
    pub fn new(code: Code, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self(vec![Refusal::new(code, reason, remedy)])
    }

    pub fn cancelled(reason: &str) -> Self {
        Self::new(Code::Cancelled, reason, "")
    }

    pub fn timeout(what: &str, limit: std::time::Duration) -> Self {
        let reason = format!("{what} took longer than {} s", limit.as_secs());
        Self::new(Code::Timeout, reason, "see the log of transshipd on both nodes")
    }

    /// A link that broke, as seen while `doing`.
    pub fn wire(doing: &str, error: &WireError) -> Self {
        let code = match error {
            WireError::Deadline(_) => Code::Timeout,
            WireError::Closed | WireError::Truncated | WireError::Io(_) => Code::Link,
            _ => Code::Malformed,
        };
        let reason = format!("{doing}: {}", chain(error));
        Self::new(code, reason, "see the network and the log of transshipd on the other node")
    }

    /// For a log line or a record.
    pub fn sentence(&self) -> String {
        self.0.iter().map(|r| r.reason.as_str()).collect::<Vec<_>>().join("; ")
    }

    /// For a message that carries one reason.
    pub fn to_message(&self) -> session::Failure {
        let first = self.0.first();
        session::Failure {
            code: first.map_or(Code::Internal, |r| r.code).as_str().into(),
            reason: self.sentence(),
            remedy: first.map(|r| r.remedy.clone()).unwrap_or_default(),
        }
    }

    pub fn from_message(peer: impl std::fmt::Display, m: session::Failure) -> Self {
        Self::new(code(&m.code), format!("{peer}: {}", m.reason), m.remedy)
    }
}

/// The text of an error and of everything beneath it.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let said = error.to_string();
        // Some libraries repeat their source in their own text.
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        source = error.source();
    }
    text
}

/// A code from a peer; one we do not know yet is a failure all the same.
pub fn code(word: &str) -> Code {
    word.parse().unwrap_or(Code::Internal)
}

impl From<LinkError> for Failure {
    fn from(error: LinkError) -> Self {
        Self::new(error.code(), chain(&error), error.remedy())
    }
}

impl From<DaemonError> for Failure {
    fn from(error: DaemonError) -> Self {
        let remedy = match &error {
            DaemonError::Refused(refusal) => return Self(vec![Refusal::clone(refusal)]),
            DaemonError::NotFound { .. } => "list what can be moved with `transship ps`",
            DaemonError::Exists { .. } => "remove or rename it first",
            DaemonError::Unavailable { .. } => {
                "see that containerd runs and that its address is in transshipd's configuration"
            }
            DaemonError::Blob { .. } => "pull the image again",
            DaemonError::Failed { .. } => "see containerd's log",
        };
        Self::new(error.code(), chain(&error), remedy)
    }
}

impl From<ShimError> for Failure {
    fn from(error: ShimError) -> Self {
        Self::new(error.code(), chain(&error), error.remedy())
    }
}

pub fn to_control(refusal: &Refusal) -> control::Refusal {
    control::Refusal {
        code: refusal.code.as_str().into(),
        reason: refusal.reason.clone(),
        remedy: refusal.remedy.clone(),
        ..Default::default()
    }
}

pub fn from_control(refusal: control::Refusal) -> Refusal {
    Refusal::new(code(&refusal.code), refusal.reason, refusal.remedy)
}

pub fn to_session(refusal: &Refusal) -> session::Refusal {
    session::Refusal {
        code: refusal.code.as_str().into(),
        reason: refusal.reason.clone(),
        remedy: refusal.remedy.clone(),
    }
}

pub fn from_session(refusal: session::Refusal) -> Refusal {
    Refusal::new(code(&refusal.code), refusal.reason, refusal.remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_the_wire_and_unknown_ones_do_not_hurt() {
        let refusal = Refusal::new(Code::HostNetwork, "why", "what");
        assert_eq!(from_session(to_session(&refusal)), refusal);
        assert_eq!(from_control(to_control(&refusal)), refusal);
        assert_eq!(code("of-a-later-version"), Code::Internal);
    }
}
