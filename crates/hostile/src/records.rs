//! What a node has written down about its migrations, as a disk gives it back.

use std::{fs, path::Path};

use transship_agent::{
    book::{Record, Role},
    fuzz,
};
use transship_migration::journal::{self, Journal, State, Subject};
use transship_types::{ContainerKey, Epoch, MigrationId, Ticket};

pub fn journal(bytes: &[u8]) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal");
    fs::write(&path, bytes).expect("a file");
    let Ok(records) = journal::read(&path) else { return };
    // What counts is a beginning of what is there, whatever was torn off.
    for cut in [bytes.len().saturating_sub(1), bytes.len() / 2] {
        fs::write(&path, &bytes[..cut]).expect("a file");
        if let Ok(fewer) = journal::read(&path) {
            assert!(records.starts_with(&fewer), "a torn record counts");
        }
    }
}

pub fn journal_seeds() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a directory");
    let subject = |role, number| Subject {
        role,
        migration: MigrationId::from_random([number; 16]),
        ticket: Ticket::from_random([2; 16]),
        namespace: "default".into(),
        container: "redis".into(),
        peer: "b".parse().expect("a name"),
        epoch: Epoch(3),
    };
    let written = |role, number, states: &[State]| {
        let mut journal = Journal::create(dir.path(), subject(role, number)).expect("a journal");
        states.iter().for_each(|state| journal.record(*state).expect("a record"));
        newest(dir.path(), number)
    };
    use transship_migration::journal::Role::{Source, Target};
    vec![
        written(Source, 1, &[State::Committed, State::Departed]),
        written(Target, 2, &[State::Prepared, State::Running]),
    ]
}

/// The journal of that migration.
fn newest(dir: &Path, number: u8) -> Vec<u8> {
    let id = MigrationId::from_random([number; 16]).to_string();
    let mut files = fs::read_dir(dir).expect("a directory").flatten();
    let file = files.find(|file| file.file_name().to_string_lossy().starts_with(&id));
    fs::read(file.expect("a journal").path()).expect("a file")
}

pub fn book(bytes: &[u8]) {
    fuzz::record(bytes);
}

pub fn book_seeds() -> Vec<Vec<u8>> {
    let key = ContainerKey::new("default", "redis").expect("a name");
    let record = |role| {
        let id = MigrationId::from_random([1; 16]);
        let record = Record::new(id, key.clone(), role, "b".parse().expect("a name"));
        serde_json::to_vec_pretty(&record).expect("a record")
    };
    vec![record(Role::Source), record(Role::Target)]
}
