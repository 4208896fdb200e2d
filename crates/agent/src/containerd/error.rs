//! What containerd refused, in our words for reasons.

use std::{
    error::Error as _,
    fmt, io,
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;
use tonic::Status;
use transship_types::{Code, ContainerKey, Refusal};

use super::blob::InvalidContent;

/// A thing in containerd, named so that its owner finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    Containerd,
    Namespace(String),
    Container(ContainerKey),
    Task(ContainerKey),
    Image(String),
    Blob(String),
    Snapshot(String),
    Lease(String),
}

impl Object {
    pub(super) fn doing(self, verb: &'static str) -> Doing {
        Doing { verb, object: self }
    }

    fn kind(&self) -> &'static str {
        match self {
            Object::Containerd => "containerd",
            Object::Namespace(_) => "namespace",
            Object::Container(_) => "container",
            Object::Task(_) => "the task of",
            Object::Image(_) => "image",
            Object::Blob(_) => "blob",
            Object::Snapshot(_) => "snapshot",
            Object::Lease(_) => "lease",
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        match self {
            Object::Containerd => Ok(()),
            Object::Container(key) | Object::Task(key) => write!(f, " {key}"),
            Object::Namespace(name)
            | Object::Image(name)
            | Object::Blob(name)
            | Object::Snapshot(name)
            | Object::Lease(name) => write!(f, " {name}"),
        }
    }
}

/// What was tried, on what: "create container default/redis".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doing {
    verb: &'static str,
    pub object: Object,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.object)
    }
}

/// containerd's own sentence.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct Said(String);

#[derive(Debug, Error)]
pub enum ContainerdError {
    #[error("containerd at {} does not answer — is it running?", socket.display())]
    Silent { socket: PathBuf, source: Said },
    #[error("cannot {doing}: no answer within {} s", limit.as_secs())]
    Slow { doing: Doing, limit: Duration },
    #[error("cannot {doing}")]
    Refused { doing: Doing, grpc: tonic::Code, source: Said },
    /// Our own reason against it.
    #[error("{}", refusal.reason)]
    Unfit { refusal: Box<Refusal> },
    #[error("cannot {tried} {}", path.display())]
    File { tried: &'static str, path: PathBuf, source: io::Error },
}

impl ContainerdError {
    pub(super) fn from_status(socket: &Path, doing: Doing, status: &Status) -> Self {
        let source = Said(status.message().to_owned());
        // An answer from containerd is a bare status. One that tonic made,
        // because there was nobody to talk to, carries its cause.
        if status.source().is_some() {
            let source = Said(root_cause(status));
            return Self::Silent { socket: socket.to_owned(), source };
        }
        Self::Refused { doing, grpc: status.code(), source }
    }

    pub(super) fn unfit(code: Code, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Unfit { refusal: Box::new(Refusal::new(code, reason, remedy)) }
    }

    /// The peer sent something that cannot be.
    pub(super) fn malformed(reason: impl Into<String>) -> Self {
        Self::unfit(Code::Malformed, reason, "")
    }

    pub(super) fn file(tried: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File { tried, path: path.to_owned(), source }
    }

    pub(super) fn is_not_found(&self) -> bool {
        self.grpc() == Some(tonic::Code::NotFound)
    }

    pub(super) fn is_already_exists(&self) -> bool {
        self.grpc() == Some(tonic::Code::AlreadyExists)
    }

    pub(super) fn grpc(&self) -> Option<tonic::Code> {
        match self {
            Self::Refused { grpc, .. } => Some(*grpc),
            _ => None,
        }
    }

    pub fn code(&self) -> Code {
        match self {
            Self::Silent { .. } => Code::Daemon,
            Self::Slow { .. } => Code::Timeout,
            Self::Refused { doing, grpc, .. } => code_of(&doing.object, *grpc),
            Self::Unfit { refusal } => refusal.code,
            Self::File { .. } => Code::Internal,
        }
    }

    /// The whole sentence and what would help, as it goes over the wire.
    pub fn refusal(&self) -> Refusal {
        let remedy = match self {
            Self::Unfit { refusal } => return (**refusal).clone(),
            Self::Silent { .. } => "start containerd, or name its socket in the configuration",
            Self::Refused { doing, .. } => remedy_for(&doing.object, self.code()),
            Self::Slow { .. } | Self::File { .. } => "",
        };
        let mut reason = self.to_string();
        if let Some(cause) = self.source() {
            reason = format!("{reason}: {cause}");
        }
        Refusal::new(self.code(), reason, remedy)
    }
}

impl From<InvalidContent> for ContainerdError {
    fn from(why: InvalidContent) -> Self {
        Self::malformed(why.to_string())
    }
}

fn root_cause(status: &Status) -> String {
    let mut cause: &dyn std::error::Error = status;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

fn code_of(object: &Object, grpc: tonic::Code) -> Code {
    use tonic::Code as Grpc;
    match (grpc, object) {
        (Grpc::NotFound, Object::Container(_)) => Code::UnknownContainer,
        (Grpc::NotFound, Object::Task(_)) => Code::NotRunning,
        (Grpc::NotFound, Object::Image(_) | Object::Blob(_) | Object::Snapshot(_)) => Code::Image,
        (Grpc::AlreadyExists, Object::Container(_) | Object::Task(_) | Object::Snapshot(_)) => {
            Code::NameTaken
        }
        (Grpc::ResourceExhausted, _) => Code::Space,
        (Grpc::DeadlineExceeded, _) => Code::Timeout,
        // What a shim or the OCI runtime behind it said.
        (_, Object::Task(_)) => Code::Runtime,
        _ => Code::Daemon,
    }
}

fn remedy_for(object: &Object, code: Code) -> &'static str {
    match (code, object) {
        (Code::UnknownContainer, _) => "`transship ps` lists what runs here",
        (Code::NotRunning, _) => "start the container first",
        (Code::NameTaken, _) => "remove or rename the container of that name on the target",
        (Code::Image, Object::Blob(_)) => "pull the image again on the source, or on the target",
        (Code::Image, Object::Image(_)) => "pull or tag the image again on the source",
        (Code::Space, _) => "make room on the target",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> ContainerKey {
        ContainerKey::new("default", "redis").unwrap()
    }

    #[test]
    fn a_status_becomes_our_word_for_it() {
        use tonic::Code as Grpc;
        let image = || Object::Image("docker.io/library/redis:7".into());
        for (object, grpc, wanted) in [
            (Object::Container(key()), Grpc::NotFound, Code::UnknownContainer),
            (Object::Task(key()), Grpc::NotFound, Code::NotRunning),
            (image(), Grpc::NotFound, Code::Image),
            (Object::Blob("sha256:00".into()), Grpc::NotFound, Code::Image),
            (Object::Container(key()), Grpc::AlreadyExists, Code::NameTaken),
            (Object::Snapshot("redis".into()), Grpc::AlreadyExists, Code::NameTaken),
            (Object::Task(key()), Grpc::Unknown, Code::Runtime),
            (Object::Containerd, Grpc::DeadlineExceeded, Code::Timeout),
            // A locked ingest, for one: containerd is there and says so.
            (Object::Blob("sha256:00".into()), Grpc::Unavailable, Code::Daemon),
        ] {
            let status = Status::new(grpc, "said");
            let error =
                ContainerdError::from_status(Path::new("/s"), object.clone().doing("try"), &status);
            assert_eq!(error.code(), wanted, "{object:?} {grpc:?}");
            assert_eq!(error.refusal().reason, format!("cannot try {object}: said"));
        }
    }
}
