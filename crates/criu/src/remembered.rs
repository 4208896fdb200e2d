//! What a checkpoint must tell its restore.
//!
//! The daemons' restore takes no options, so the dump writes them beside its
//! images and the gate puts them into the RESTORE request.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};
use transship_api::{criu::CriuOpts, session};

use crate::{Amendments, CriuError};

/// The options of a dump that its restore needs again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Remembered {
    pub tcp_established: bool,
    pub tcp_close: bool,
    pub file_locks: bool,
    pub ext_unix_sockets: bool,
    pub shell_job: bool,
    pub tcp_skip_in_flight: bool,
    pub link_remap: bool,
}

impl Remembered {
    /// In the image directory; CRIU ignores names it does not know.
    pub const FILE: &str = "transship.json";

    /// From what was really asked of CRIU, amendments included.
    pub fn of_dump(options: &CriuOpts) -> Self {
        Self {
            tcp_established: options.tcp_established(),
            tcp_close: options.tcp_close(),
            file_locks: options.file_locks(),
            ext_unix_sockets: options.ext_unix_sk(),
            shell_job: options.shell_job(),
            tcp_skip_in_flight: options.tcp_skip_in_flight(),
            link_remap: options.link_remap(),
        }
    }

    /// Adds to what the runtime asks; takes nothing away, except that a
    /// connection is either kept or closed.
    pub fn apply(&self, request: &mut Amendments<'_>) {
        if self.tcp_close {
            request.tcp_close(true);
            request.tcp_established(false);
        } else if self.tcp_established {
            request.tcp_established(true);
        }
        if self.file_locks {
            request.file_locks(true);
        }
        if self.ext_unix_sockets {
            request.ext_unix_sk(true);
        }
        if self.shell_job {
            request.shell_job(true);
        }
        if self.tcp_skip_in_flight {
            request.tcp_skip_in_flight(true);
        }
        if self.link_remap {
            request.link_remap(true);
        }
    }

    pub fn write(&self, images: &Path) -> Result<(), CriuError> {
        let path = images.join(Self::FILE);
        let json = serde_json::to_vec_pretty(self)
            .map_err(|error| CriuError::file("encoding", &path)(error.into()))?;
        fs::write(&path, json).map_err(CriuError::file("writing", &path))
    }

    /// `None`: the images are somebody else's checkpoint.
    pub fn read(images: &Path) -> Result<Option<Self>, CriuError> {
        let path = images.join(Self::FILE);
        let json = match fs::read(&path) {
            Ok(json) => json,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(CriuError::file("reading", &path)(error)),
        };
        let remembered = serde_json::from_slice(&json)
            .map_err(|error| CriuError::file("decoding", &path)(error.into()))?;
        Ok(Some(remembered))
    }
}

impl From<&Remembered> for session::Remembered {
    fn from(from: &Remembered) -> Self {
        Self {
            tcp_established: from.tcp_established,
            tcp_close: from.tcp_close,
            file_locks: from.file_locks,
            ext_unix_sockets: from.ext_unix_sockets,
            shell_job: from.shell_job,
            tcp_skip_in_flight: from.tcp_skip_in_flight,
            link_remap: from.link_remap,
        }
    }
}

impl From<&session::Remembered> for Remembered {
    fn from(from: &session::Remembered) -> Self {
        Self {
            tcp_established: from.tcp_established,
            tcp_close: from.tcp_close,
            file_locks: from.file_locks,
            ext_unix_sockets: from.ext_unix_sockets,
            shell_job: from.shell_job,
            tcp_skip_in_flight: from.tcp_skip_in_flight,
            link_remap: from.link_remap,
        }
    }
}
