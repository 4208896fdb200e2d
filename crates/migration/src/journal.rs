//! What a node has decided about a migration, on disk before anybody is told.
//!
//! One small file per migration and role, one line per record:
//! `CRC32 JSON\n`, appended and fsynced. A torn last line is what a crash in
//! the middle of a write leaves; it was never acted upon, so it is dropped. A
//! bad line anywhere else is damage and an error.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::warn;
use transship_types::{Epoch, MigrationId, NodeName, Ticket};

use crate::{MigrationError, decide::Journaled, error::chain};

/// The format's version, in every record.
const VERSION: u32 = 1;

/// Which end of the migration a journal belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Source,
    Target,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Source => "source",
            Role::Target => "target",
        }
    }
}

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Something is under way; nothing is decided.
    Offered,
    /// Target: restored and held; it will run if told to.
    Prepared,
    /// Source: it will not run here unless the target refuses.
    Committed,
    /// Target: it runs here, or is about to, and some of its pages are still
    /// at the source.
    Owing,
    /// Target: it runs here, or is about to.
    Running,
    /// Target: it has run here.
    Released,
    /// Source: it runs there.
    Departed,
    /// It runs at the source; the target has nothing.
    Aborted,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Offered => "offered",
            State::Prepared => "prepared",
            State::Committed => "committed",
            State::Running => "running",
            State::Released => "released",
            State::Owing => "owing",
            State::Departed => "departed",
            State::Aborted => "aborted",
        }
    }
}

/// One line of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub version: u32,
    pub state: State,
    #[serde(flatten)]
    pub subject: Subject,
}

/// What every record of one journal says alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    pub role: Role,
    pub migration: MigrationId,
    pub ticket: Ticket,
    pub namespace: String,
    pub container: String,
    pub peer: NodeName,
    pub epoch: Epoch,
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    subject: Subject,
}

/// Proof that a `committed` record is on disk.
#[derive(Debug)]
pub struct Committed(());

impl Journal {
    /// Creates the journal with its first record, [`State::Offered`].
    pub fn create(directory: &Path, subject: Subject) -> Result<Self, MigrationError> {
        let path = path(directory, &subject.migration, subject.role);
        let file = open_new(directory, &path)
            .map_err(|source| MigrationError::Journal { path: path.clone(), source })?;
        let mut journal = Self { path, file, subject };
        journal.record(State::Offered)?;
        Ok(journal)
    }

    /// On disk when this returns.
    pub fn record(&mut self, state: State) -> Result<(), MigrationError> {
        let record = Record { version: VERSION, state, subject: self.subject.clone() };
        let written = self.file.write_all(line(&record).as_bytes());
        written
            .and_then(|()| self.file.sync_data())
            .map_err(|source| MigrationError::Journal { path: self.path.clone(), source })
    }

    pub fn commit(&mut self) -> Result<Committed, MigrationError> {
        self.record(State::Committed)?;
        Ok(Committed(()))
    }

    /// Somebody has decided without proof: what follows is of this epoch.
    pub fn decide(&mut self, epoch: Epoch, state: State) -> Result<(), MigrationError> {
        self.subject.epoch = epoch;
        self.record(state)
    }

    /// Both sides know the ending: nobody will ask again.
    pub fn settle(self) -> Result<(), MigrationError> {
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(MigrationError::Journal { path: self.path, source })
            }
            _ => Ok(()),
        }
    }
}

/// Whose pages are owed, if this is the journal of an arrival that lacks some.
pub fn owed(path: &Path) -> Option<Subject> {
    let last = read(path).ok()?.pop()?;
    let owed = last.subject.role == Role::Target && last.state == State::Owing;
    owed.then_some(last.subject)
}

/// Every record of a journal, oldest first.
pub fn read(path: &Path) -> Result<Vec<Record>, MigrationError> {
    let damaged = |source| MigrationError::Journal { path: path.into(), source };
    let text = fs::read(path).map_err(damaged)?;
    parse(&text).map_err(damaged)
}

/// What the shim of this end has decided last, as far as its journal tells.
pub fn last(directory: &Path, migration: &MigrationId, role: Role) -> Journaled {
    let path = path(directory, migration, role);
    match read(&path) {
        Ok(records) => match records.last() {
            Some(record) => Journaled::Last(record.state),
            // Torn in its first record: nothing had been begun.
            None => Journaled::Absent,
        },
        Err(MigrationError::Journal { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Journaled::Absent
        }
        Err(error) => {
            warn!(error = chain(&error), "a journal tells nothing");
            Journaled::Damaged
        }
    }
}

/// Where the journal of one end is.
pub fn path(directory: &Path, migration: &MigrationId, role: Role) -> PathBuf {
    directory.join(format!("{migration}.{}", role.as_str()))
}

fn open_new(directory: &Path, path: &Path) -> io::Result<File> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(path)?;
    // The name must survive a crash too, not only what is in the file.
    File::open(directory)?.sync_all()?;
    Ok(file)
}

fn line(record: &Record) -> String {
    // A struct of strings and numbers always has a JSON form.
    let json = serde_json::to_string(record).expect("a record serialises");
    format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()))
}

fn parse(bytes: &[u8]) -> io::Result<Vec<Record>> {
    let mut records = Vec::new();
    let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').peekable();
    while let Some(bytes) = lines.next() {
        match parse_line(bytes) {
            Some(record) if record.version == VERSION => records.push(record),
            Some(record) => {
                let text = format!("record version {} is not known", record.version);
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            // Torn by a crash: whoever wrote it never acted upon it.
            None if lines.peek().is_none() => break,
            None => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a record is damaged"));
            }
        }
    }
    Ok(records)
}

fn parse_line(bytes: &[u8]) -> Option<Record> {
    let text = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?;
    let (crc, json) = text.split_once(' ')?;
    let crc = u32::from_str_radix(crc, 16).ok()?;
    if crc != crc32fast::hash(json.as_bytes()) {
        return None;
    }
    serde_json::from_str(json).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> Subject {
        Subject {
            role: Role::Source,
            migration: MigrationId::from_random([1; 16]),
            ticket: Ticket::from_random([2; 16]),
            namespace: "default".into(),
            container: "redis".into(),
            peer: "b".parse().unwrap(),
            epoch: Epoch(3),
        }
    }

    #[test]
    fn records_come_back_in_order_and_a_settled_journal_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), subject()).unwrap();
        journal.commit().unwrap();
        journal.record(State::Departed).unwrap();
        let path = journal.path.clone();
        let states: Vec<_> = read(&path).unwrap().iter().map(|record| record.state).collect();
        assert_eq!(states, [State::Offered, State::Committed, State::Departed]);
        journal.settle().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_journal_is_never_opened_twice() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Journal::create(dir.path(), subject()).unwrap();
        assert!(Journal::create(dir.path(), subject()).is_err());
    }

    #[test]
    fn every_torn_tail_is_dropped_and_nothing_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), subject()).unwrap();
        let offered = fs::read(&journal.path).unwrap().len();
        journal.commit().unwrap();
        let whole = fs::read(&journal.path).unwrap();
        for length in 0..whole.len() {
            let records = parse(&whole[..length]).unwrap();
            let expected = if length < offered { 0 } else { 1 };
            assert_eq!(records.len(), expected, "cut at {length}");
        }
        assert_eq!(parse(&whole).unwrap().len(), 2);
    }

    #[test]
    fn a_decision_is_of_a_higher_epoch() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), subject()).unwrap();
        journal.commit().unwrap();
        journal.decide(Epoch(4), State::Aborted).unwrap();
        let epochs: Vec<_> =
            read(&journal.path).unwrap().iter().map(|record| record.subject.epoch.0).collect();
        assert_eq!(epochs, [3, 3, 4]);
    }

    #[test]
    fn damage_in_the_middle_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), subject()).unwrap();
        journal.commit().unwrap();
        let mut bytes = fs::read(&journal.path).unwrap();
        bytes[20] ^= 1;
        assert!(parse(&bytes).is_err());
    }
}
