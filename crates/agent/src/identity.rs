//! What this node proves itself with and whom it believes, replaced while the
//! agent runs.
//!
//! The files of the configuration are read when the agent starts and when it
//! is told to (SIGHUP). What was read and found good is copied below the
//! runtime directory, and the shims are given the copies: so agent and shims
//! change over together, and nobody reads half of what somebody is writing.
//! Files that are no good change nothing.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use thiserror::Error;
use time::{Duration, OffsetDateTime};
use transship_link::{Credentials, LinkError, Pem, Trust, renewal};
use transship_types::NodeName;

/// Enough for a person on holiday to come back to.
pub const NOTICE: Duration = Duration::days(30);

#[derive(Debug, Error)]
pub enum IdentityError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("{} names {named}, and this node is {here}", path.display())]
    OtherNode { path: PathBuf, named: NodeName, here: NodeName },
    /// Without it, who was revoked would be let in again.
    #[error("the revocation list {} is gone", .0.display())]
    NoList(PathBuf),
    #[error("copies for the shims cannot be made in {}", dir.display())]
    Copies {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// One set of files, in use.
#[derive(Debug)]
pub struct Identity {
    pub trust: Trust,
    /// The copies.
    pub files: Credentials,
    /// The revocation list that was read, given or found.
    crl: Option<PathBuf>,
}

/// The set in use, and how it gets another one.
#[derive(Debug)]
pub struct Identities {
    given: Credentials,
    /// Of the copies, a directory for each set.
    dir: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    current: Arc<Identity>,
    number: u64,
    /// Why the last reading changed nothing.
    refused: Option<String>,
}

impl Identities {
    /// Reads the files for the first time. The copies lie in a directory of
    /// this process below `dir`: another agent may be serving, whose copies
    /// are in use, and that shows only later.
    pub fn open(given: &Credentials, dir: &Path) -> Result<Identities, IdentityError> {
        let dir = &dir.join(std::process::id().to_string());
        match fs::remove_dir_all(dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(copies(dir)(e)),
            _ => {}
        }
        let current = Arc::new(read(given, &dir.join("1"))?);
        let inner = Inner { current, number: 1, refused: None };
        Ok(Identities { given: given.clone(), dir: dir.into(), inner: inner.into() })
    }

    pub fn current(&self) -> Arc<Identity> {
        self.inner().current.clone()
    }

    /// Why the files as they are now are not in use.
    pub fn refused(&self) -> Option<String> {
        self.inner().refused.clone()
    }

    /// Reads the files again; connections from then on use what is in them.
    /// On an error everything stays as it was.
    pub fn renew(&self) -> Result<Arc<Identity>, IdentityError> {
        let mut inner = self.inner();
        let number = inner.number + 1;
        match self.replacement(&inner.current, number) {
            Ok(new) => {
                // A shim that was given the former copies may be about to read
                // them; it has long read those before.
                let _ = fs::remove_dir_all(self.dir.join((number - 2).to_string()));
                *inner = Inner { current: Arc::new(new), number, refused: None };
                Ok(inner.current.clone())
            }
            Err(error) => {
                let _ = fs::remove_dir_all(self.dir.join(number.to_string()));
                inner.refused = Some(crate::failure::chain(&error));
                Err(error)
            }
        }
    }

    fn replacement(&self, old: &Identity, number: u64) -> Result<Identity, IdentityError> {
        let new = read(&self.given, &self.dir.join(number.to_string()))?;
        let (here, named) = (old.trust.node(), new.trust.node());
        if here != named {
            let path = self.given.certificate.clone();
            return Err(IdentityError::OtherNode {
                path,
                named: named.clone(),
                here: here.clone(),
            });
        }
        if let (Some(gone), None) = (&old.crl, &new.crl) {
            return Err(IdentityError::NoList(gone.clone()));
        }
        // A set that our own side of a connection would refuse is worse than
        // the one in use: expired, revoked, or a mixture of old and new.
        new.trust.vet()?;
        Ok(new)
    }

    /// Removes what agents before this one left, once it is certain that none
    /// of them serves.
    pub fn sweep(&self) {
        let all = self.dir.parent().map(fs::read_dir);
        for entry in all.into_iter().flatten().flatten().flatten() {
            if entry.path() != self.dir {
                // It harms nobody but for lying there.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// The copies go with the agent.
    pub fn close(&self) {
        let _ = fs::remove_dir_all(&self.dir);
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic leaves the set in use as it was.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Identity {
    /// What a person should do soon, and why.
    pub fn warnings(&self, now: OffsetDateTime) -> Vec<(String, String)> {
        let (node, until) = (self.trust.node(), self.trust.until());
        let mut warnings = Vec::new();
        if until - now < NOTICE {
            let detail = format!("the certificate of {node} expires on {}", until.date());
            warnings.push((detail, renewal(Some(node))));
        }
        if let Some(until) = self.trust.crl_until().filter(|until| *until < now) {
            let detail = format!("the revocation list was to be replaced by {}", until.date());
            let remedy = "get the CA's present one, and `systemctl reload transshipd`";
            warnings.push((detail, remedy.into()));
        }
        warnings
    }
}

fn read(given: &Credentials, copies_in: &Path) -> Result<Identity, IdentityError> {
    let mut files = given.clone();
    // Where `transshipd revoke` tells people to put it.
    let usual = given.ca.with_file_name("crl.pem");
    files.crl = files.crl.or_else(|| usual.exists().then_some(usual));
    let pem = Pem::read(&files)?;
    let trust = Trust::new(&pem)?;
    let copied = pem.copy_to(copies_in).map_err(copies(copies_in))?;
    Ok(Identity { trust, files: copied, crl: files.crl })
}

fn copies(dir: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let dir = dir.to_owned();
    move |source| IdentityError::Copies { dir, source }
}
