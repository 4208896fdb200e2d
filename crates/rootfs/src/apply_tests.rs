use std::{
    fs::{read, read_dir, read_link},
    os::unix::fs::{MetadataExt, symlink},
};

use super::*;
use crate::format::{Meta, Name};

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_644;

/// Owned by whoever runs the tests, so that they need no privileges.
fn meta(mode: u32) -> Meta {
    let owner = tempfile::tempfile().unwrap().metadata().unwrap();
    let (uid, gid) = (owner.uid(), owner.gid());
    Meta { mode, uid, gid, modified: (1_000_000_000, 123_456_789), attributes: Vec::new() }
}

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

fn root() -> Record {
    Record::Root { replace: false, meta: meta(DIRECTORY) }
}

fn enter(text: &str) -> Record {
    Record::Enter { name: name(text), replace: false, meta: meta(DIRECTORY) }
}

fn file(text: &str, size: u64) -> Record {
    Record::File { name: name(text), meta: meta(FILE), size }
}

fn end(entries: u64, bytes: u64) -> Record {
    Record::End { entries, bytes }
}

/// A stream; content stands for itself.
enum Part {
    Of(Record),
    Content(&'static [u8]),
}

fn stream(parts: Vec<Part>) -> Vec<u8> {
    let mut out = vec![VERSION];
    for part in parts {
        match part {
            Part::Of(record) => record.encode(&mut out),
            Part::Content(bytes) => out.extend(bytes),
        }
    }
    out
}

fn records(list: Vec<Record>) -> Vec<u8> {
    stream(list.into_iter().map(Part::Of).collect())
}

fn apply(root: &Path, bytes: &[u8]) -> Result<Totals, RootfsError> {
    let mut receiver = Receiver::new(root)?;
    receiver.feed(bytes)?;
    receiver.finish()
}

fn problem(root: &Path, bytes: &[u8]) -> Problem {
    match apply(root, bytes) {
        Err(RootfsError::Malformed { problem, .. }) => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_entry_too_many_is_not_made() {
    let root_dir = tempfile::tempdir().unwrap();
    let mut receiver = Receiver::new(root_dir.path()).unwrap();
    receiver.feed(&records(vec![root()])).unwrap();
    // As if all but one had been made.
    receiver.totals.entries = MAX_ENTRIES - 1;
    let mut next = Vec::new();
    for entry in [enter("last"), enter("beyond")] {
        entry.encode(&mut next);
    }
    let refused = receiver.feed(&next);
    assert!(matches!(refused, Err(RootfsError::TooManyEntries { limit: MAX_ENTRIES })));
    assert!(root_dir.path().join("last").is_dir());
    assert!(!root_dir.path().join("last/beyond").exists());
}

fn small_tree() -> Vec<u8> {
    stream(vec![
        Part::Of(root()),
        Part::Of(enter("d")),
        Part::Of(file("f", 10_000)),
        Part::Of(Record::Data { offset: 4, length: 5 }),
        Part::Content(b"hello"),
        Part::Of(Record::Data { offset: 9_000, length: 2 }),
        Part::Content(b"ab"),
        Part::Of(Record::FileEnd),
        Part::Of(Record::Link { name: name("g"), first: vec![name("d"), name("f")] }),
        Part::Of(Record::Symlink {
            name: name("s"),
            meta: meta(0o120_777),
            target: b"../../etc".into(),
        }),
        Part::Of(Record::Leave),
        Part::Of(Record::Node { name: name("p"), meta: meta(0o010_600), major: 0, minor: 0 }),
        Part::Of(end(5, 7)),
    ])
}

#[test]
fn any_cut_of_the_stream_gives_the_same_tree() {
    let bytes = small_tree();
    for step in [1, 2, 3, 7, 64, bytes.len()] {
        let base = tempfile::tempdir().unwrap();
        let mut receiver = Receiver::new(base.path()).unwrap();
        for piece in bytes.chunks(step) {
            receiver.feed(piece).unwrap();
        }
        assert_eq!(receiver.finish().unwrap(), Totals { entries: 5, bytes: 7 });

        let content = read(base.path().join("d/f")).unwrap();
        assert_eq!(content.len(), 10_000);
        assert_eq!(&content[..10], b"\0\0\0\0hello\0");
        assert_eq!(&content[9_000..9_003], b"ab\0");
        let status = |path: &str| base.path().join(path).symlink_metadata().unwrap();
        assert_eq!(status("d/f").ino(), status("d/g").ino());
        assert_eq!(status("d").mtime(), 1_000_000_000);
        assert_eq!(status("d").mtime_nsec(), 123_456_789);
        assert_eq!(status("").mtime_nsec(), 123_456_789);
        assert_eq!(status("p").mode(), 0o010_600);
        assert_eq!(read_link(base.path().join("d/s")).unwrap(), Path::new("../../etc"));
    }
}

#[test]
fn every_truncation_is_an_error_and_leaves_no_torn_file() {
    let bytes = small_tree();
    for length in 0..bytes.len() {
        let base = tempfile::tempdir().unwrap();
        std::fs::create_dir(base.path().join("d")).unwrap();
        std::fs::write(base.path().join("d/f"), "old").unwrap();
        let error = apply(base.path(), &bytes[..length]).unwrap_err();
        assert!(
            matches!(error, RootfsError::Malformed { problem: Problem::Truncated, .. }),
            "{length}: {error}"
        );
        let content = read(base.path().join("d/f")).unwrap();
        assert!(content == b"old" || content.len() == 10_000, "{length}");
        let strays = read_dir(base.path().join("d"))
            .unwrap()
            .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains("transship"));
        assert_eq!(strays.count(), 0, "{length}");
    }
}

/// Whatever single byte is damaged: an error or another tree, never a panic
/// and nothing outside of the root.
#[test]
fn damaged_streams_stay_inside() {
    let bytes = small_tree();
    for at in 0..bytes.len() {
        for value in [0x00, 0x2e, 0x2f, 0xff] {
            let outer = tempfile::tempdir().unwrap();
            let base = outer.path().join("root");
            std::fs::create_dir(&base).unwrap();
            let mut damaged = bytes.clone();
            damaged[at] = value;
            // Owners and modes may be any; those a test cannot set are errors.
            let _ = apply(&base, &damaged);
            assert_eq!(read_dir(outer.path()).unwrap().count(), 1, "byte {at} = {value:#x}");
        }
    }
}

#[test]
fn links_out_of_the_root_are_not_followed() {
    let outer = tempfile::tempdir().unwrap();
    let base = outer.path().join("root");
    let secret = outer.path().join("secret");
    std::fs::create_dir(&base).unwrap();
    std::fs::create_dir(&secret).unwrap();
    std::fs::write(secret.join("file"), "untouched").unwrap();
    let planted = || {
        for link in ["away", "hole"] {
            let _ = std::fs::remove_file(base.join(link));
            let _ = std::fs::remove_dir_all(base.join(link));
        }
        symlink(&secret, base.join("away")).unwrap();
        symlink(secret.join("file"), base.join("hole")).unwrap();
    };

    // A directory comes in place of the link; a file replaces the link.
    planted();
    let entries = vec![
        root(),
        enter("away"),
        file("file", 0),
        Record::FileEnd,
        Record::Leave,
        file("hole", 0),
        Record::FileEnd,
        end(3, 0),
    ];
    apply(&base, &records(entries)).unwrap();
    assert!(base.join("away").symlink_metadata().unwrap().is_dir());
    assert!(base.join("hole").symlink_metadata().unwrap().is_file());

    // A hard link's other name does not lead through the link.
    planted();
    let link = Record::Link { name: name("stolen"), first: vec![name("away"), name("file")] };
    let error = apply(&base, &records(vec![root(), link])).unwrap_err();
    assert!(matches!(error, RootfsError::Io { .. }), "{error}");
    assert!(error.to_string().contains("stolen"), "{error}");

    // Removing the link leaves what it points to.
    planted();
    let gone = |text| Record::Remove { name: name(text) };
    apply(&base, &records(vec![root(), gone("away"), gone("hole"), end(2, 0)])).unwrap();
    assert_eq!(read_dir(&base).unwrap().count(), 0);
    assert_eq!(read(secret.join("file")).unwrap(), b"untouched");
    assert_eq!(read_dir(&secret).unwrap().count(), 1);
}

#[test]
fn a_link_that_appears_while_the_stream_arrives_is_not_followed() {
    let outer = tempfile::tempdir().unwrap();
    let base = outer.path().join("root");
    std::fs::create_dir_all(base.join("d/e")).unwrap();
    std::fs::create_dir(outer.path().join("e")).unwrap();
    let whole = records(vec![root(), enter("d"), enter("e"), file("f", 0), Record::FileEnd]);
    let after_d = records(vec![root(), enter("d")]).len();
    let mut receiver = Receiver::new(&base).unwrap();
    receiver.feed(&whole[..after_d]).unwrap();
    std::fs::rename(base.join("d"), base.join("moved")).unwrap();
    symlink("..", base.join("d")).unwrap();
    // "d" is still the directory that was opened as such; "e" below it would
    // be looked up from the root again.
    let error = receiver.feed(&whole[after_d..]).unwrap_err();
    assert!(matches!(error, RootfsError::Io { .. }), "{error}");
    assert_eq!(read_dir(outer.path().join("e")).unwrap().count(), 0);
    assert!(matches!(receiver.feed(b""), Err(RootfsError::GivenUp)));
    assert!(matches!(receiver.finish(), Err(RootfsError::GivenUp)));
}

#[test]
fn records_out_of_place_are_refused() {
    let data = |offset, length| Record::Data { offset, length };
    let cases: Vec<(&str, Vec<Record>)> = vec![
        ("no root", vec![enter("d")]),
        ("two roots", vec![root(), root()]),
        ("leaving the root", vec![root(), Record::Leave]),
        ("an end inside a directory", vec![root(), enter("d"), end(1, 0)]),
        ("an end inside a file", vec![root(), file("f", 0), end(1, 0)]),
        ("data without a file", vec![root(), data(0, 1)]),
        ("the end of no file", vec![root(), Record::FileEnd]),
        ("a directory inside a file", vec![root(), file("f", 0), enter("d")]),
        ("leaving inside a file", vec![root(), enter("d"), file("f", 0), Record::Leave]),
        ("data behind the end", vec![root(), file("f", 3), data(3, 1)]),
        ("data far behind the end", vec![root(), file("f", 3), data(u64::MAX, 2)]),
        ("a record after the end", vec![root(), end(0, 0), Record::Leave]),
        ("a link to a directory", vec![root(), enter("d"), Record::Leave, link("l", &["d"])]),
        ("a link to itself", vec![root(), file("f", 0), Record::FileEnd, link("g", &["g"])]),
    ];
    for (what, list) in cases {
        let base = tempfile::tempdir().unwrap();
        std::fs::write(base.path().join("g"), "").unwrap();
        let problem = problem(base.path(), &records(list));
        assert!(matches!(problem, Problem::Place(_)), "{what}: {problem:?}");
    }
}

fn link(text: &str, first: &[&str]) -> Record {
    Record::Link { name: name(text), first: first.iter().copied().map(name).collect() }
}

#[test]
fn no_name_comes_twice() {
    let base = tempfile::tempdir().unwrap();
    let twice = |second: Record| records(vec![root(), enter("d"), Record::Leave, second]);
    for second in [enter("d"), file("d", 0), enter("c"), Record::Remove { name: name("d") }] {
        let problem = problem(base.path(), &twice(second));
        assert!(matches!(problem, Problem::Order { .. }), "{problem:?}");
    }
}

#[test]
fn totals_and_version_must_be_right() {
    let base = tempfile::tempdir().unwrap();
    assert!(matches!(
        problem(base.path(), &records(vec![root(), enter("d"), Record::Leave, end(2, 0)])),
        Problem::Totals { what: "entries", said: 2, had: 1 }
    ));
    assert!(matches!(
        problem(base.path(), &records(vec![root(), end(0, 1)])),
        Problem::Totals { what: "bytes", .. }
    ));
    assert_eq!(problem(base.path(), &[2]), Problem::Version(2));
    assert_eq!(problem(base.path(), b""), Problem::Truncated);
}

#[test]
fn errors_name_the_entry() {
    let base = tempfile::tempdir().unwrap();
    let list = vec![root(), enter("etc"), file("passwd", 1), Record::Data { offset: 9, length: 1 }];
    let error = apply(base.path(), &records(list)).unwrap_err().to_string();
    assert!(error.contains("/etc/passwd"), "{error}");
}

#[test]
fn paths_that_grow_too_long_are_refused() {
    let base = tempfile::tempdir().unwrap();
    let long = "x".repeat(255);
    let list = std::iter::once(root()).chain((0..20).map(|_| enter(&long))).collect();
    let problem = problem(base.path(), &records(list));
    assert!(matches!(problem, Problem::Limit { limit: 4095, .. }), "{problem:?}");
}

#[test]
fn whatever_was_there_gives_way() {
    let base = tempfile::tempdir().unwrap();
    let path = |text: &str| base.path().join(text);
    std::fs::create_dir_all(path("a/deep/er")).unwrap();
    std::fs::write(path("a/deep/file"), "").unwrap();
    std::fs::create_dir_all(path("b/c")).unwrap();
    std::fs::write(path("c"), "a file").unwrap();
    std::fs::write(path("e"), "").unwrap();
    std::fs::write(path(".transship-0"), "the container's own").unwrap();
    let replaced = Record::Enter { name: name("b"), replace: true, meta: meta(DIRECTORY) };
    let socket = Record::Node { name: name("e"), meta: meta(0o140_777), major: 0, minor: 0 };
    let list = vec![
        root(),
        file("a", 0),
        Record::FileEnd,
        replaced,
        Record::Leave,
        file("c", 1),
        Record::FileEnd,
        socket,
        end(4, 0),
    ];
    apply(base.path(), &records(list)).unwrap();
    assert!(path("a").is_file());
    assert_eq!(read_dir(path("b")).unwrap().count(), 0);
    assert_eq!(read(path("c")).unwrap(), b"\0");
    assert_eq!(path("e").symlink_metadata().unwrap().mode(), 0o140_777);
    assert_eq!(read(path(".transship-0")).unwrap(), b"the container's own");

    let emptied = Record::Root { replace: true, meta: meta(DIRECTORY) };
    apply(base.path(), &records(vec![emptied, end(0, 0)])).unwrap();
    assert_eq!(read_dir(base.path()).unwrap().count(), 0);
}

#[test]
fn attributes_that_were_not_sent_go() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("d");
    std::fs::create_dir(&directory).unwrap();
    let set = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(&directory, "user.old", b"1", set).unwrap();
    let mut with = meta(DIRECTORY);
    with.attributes =
        vec![crate::format::Attribute { name: b"user.new".into(), value: b"2".into() }];
    let entered = Record::Enter { name: name("d"), replace: false, meta: with };
    apply(base.path(), &records(vec![root(), entered, Record::Leave, end(1, 0)])).unwrap();
    let mut buffer = [0; 16];
    assert!(rustix::fs::getxattr(&directory, "user.old", &mut buffer[..]).is_err());
    assert_eq!(rustix::fs::getxattr(&directory, "user.new", &mut buffer[..]), Ok(1));
}
