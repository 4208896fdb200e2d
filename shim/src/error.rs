//! What can go wrong in the shim, and the code a client sees for it.

use std::{io, path::Path};

use containerd_shim_protos::ttrpc::{self, Code};
use serde_json::error::Category;
use thiserror::Error;

pub type Result<T> = std::result::Result<T, Error>;

/// An error of the Task API. The variant decides the code on the wire, the
/// text says what we tried and on what.
#[derive(Debug, Error)]
pub enum Error {
    #[error("{0}")]
    InvalidArgument(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    AlreadyExists(String),
    #[error("{0}")]
    FailedPrecondition(String),
    #[error("{0}")]
    Unimplemented(String),
    #[error("{0}")]
    Cancelled(String),
    #[error("{doing}")]
    Io { doing: String, source: io::Error },
    /// The OCI runtime refused; `said` is what its log gives as the reason.
    #[error("OCI runtime {action} failed: {said}")]
    Runtime { action: &'static str, said: String },
    /// Something else that failed for a reason of its own.
    #[error("{doing}")]
    Other { doing: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("{0}")]
    Internal(String),
}

impl Error {
    pub fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let doing = doing.into();
        move |source| Error::Io { doing, source }
    }

    /// For calls of `nix`: an errno on a path.
    pub fn errno(doing: &str, path: &Path) -> impl FnOnce(nix::Error) -> Error {
        let doing = format!("{doing} {}", path.display());
        move |errno| Error::Io { doing, source: errno.into() }
    }

    pub fn other<E>(doing: impl Into<String>) -> impl FnOnce(E) -> Error
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let doing = doing.into();
        move |source| Error::Other { doing, source: Box::new(source) }
    }

    /// It was killed while it had no process yet.
    pub fn killed_unborn(id: &str) -> Error {
        Error::Cancelled(format!("container {id} was killed before it was restored"))
    }

    /// The owner of a container is gone: it was deleted meanwhile.
    pub fn gone(id: &str) -> Error {
        Error::NotFound(format!("container {id} was deleted"))
    }

    /// Where JSON is wrong, and not what is there: the library quotes the
    /// value, which in a spec may be a container's secret.
    pub fn json(error: &serde_json::Error) -> String {
        let what = match error.classify() {
            Category::Data => "a value of the wrong kind",
            Category::Syntax => "no JSON",
            Category::Eof => "the text ends",
            Category::Io => "the text cannot be read",
        };
        format!("{what} in line {} at column {}", error.line(), error.column())
    }

    /// The whole chain of causes in one line.
    pub fn sentence(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }

    fn code(&self) -> Code {
        match self {
            Error::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Error::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Error::Unimplemented(_) => Code::UNIMPLEMENTED,
            Error::Cancelled(_) => Code::CANCELLED,
            Error::Io { .. } | Error::Runtime { .. } | Error::Other { .. } | Error::Internal(_) => {
                Code::UNKNOWN
            }
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.sentence()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_that_is_wrong_is_not_quoted() {
        for (json, said) in [
            (r#"{"process":{"env":"CANARY"}}"#, "a value of the wrong kind in line 1"),
            (r#"{"annotations":["CANARY"]}"#, "a value of the wrong kind in line 1"),
            (r#"{"root": CANARY}"#, "no JSON in line 1"),
            (r#"{"root": "CANARY"#, "the text ends in line 1"),
        ] {
            let error = serde_json::from_str::<oci_spec::runtime::Spec>(json).unwrap_err();
            let shown = Error::json(&error);
            assert!(shown.contains(said) && !shown.contains("CANARY"), "{shown}");
        }
    }

    #[test]
    fn a_client_sees_every_cause_once() {
        let error = Error::io("open the stdout fifo /run/x")(io::Error::from_raw_os_error(2));
        let ttrpc::Error::RpcStatus(status) = error.into() else { panic!("a status is wanted") };
        assert_eq!(
            status.message(),
            "open the stdout fifo /run/x: No such file or directory (os error 2)"
        );
        assert_eq!(status.code(), Code::UNKNOWN);
    }
}
