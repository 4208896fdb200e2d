//! The PEM files that a node proves itself with.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::LinkError;

/// Where they are. The certificate's file may hold intermediates after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Revocation lists. With them, the status of every certificate below the
    /// CA's own must be known.
    #[serde(default)]
    pub crl: Option<PathBuf>,
}

/// What is in them, all read at once: a file that changes a moment later
/// changes nothing here.
pub struct Pem {
    /// For errors.
    pub(crate) files: Credentials,
    pub(crate) ca: Vec<u8>,
    pub(crate) certificate: Vec<u8>,
    pub(crate) key: Zeroizing<Vec<u8>>,
    pub(crate) crl: Option<Vec<u8>>,
}

impl Pem {
    /// Blocking, but a few kilobytes.
    pub fn read(files: &Credentials) -> Result<Pem, LinkError> {
        Ok(Pem {
            ca: read(&files.ca)?,
            certificate: read(&files.certificate)?,
            key: Zeroizing::new(read(&files.key)?),
            crl: files.crl.as_deref().map(read).transpose()?,
            files: files.clone(),
        })
    }

    /// Copies for others of this node that root runs: in a directory of their
    /// own, which must not exist yet, and which only root may enter.
    pub fn copy_to(&self, dir: &Path) -> io::Result<Credentials> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.join(name);
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            file.and_then(|mut file| file.write_all(bytes)).map(|()| path)
        };
        Ok(Credentials {
            ca: write("ca.pem", &self.ca)?,
            certificate: write("node.pem", &self.certificate)?,
            key: write("node.key", &self.key)?,
            crl: self.crl.as_ref().map(|crl| write("crl.pem", crl)).transpose()?,
        })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, LinkError> {
    fs::read(path).map_err(|e| LinkError::Credentials { path: path.into(), why: e.to_string() })
}
