use super::*;

fn meta(kind: u32) -> Meta {
    Meta {
        mode: kind | 0o4755,
        uid: 1000,
        gid: 100,
        modified: (-1, 999_999_999),
        attributes: vec![Attribute { name: b"user.a".into(), value: b"v".into() }],
    }
}

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

fn every_kind() -> Vec<Record> {
    vec![
        Record::Root { replace: true, meta: meta(0o040_000) },
        Record::Enter { name: name("etc"), replace: false, meta: meta(0o040_000) },
        Record::File { name: name("f"), meta: meta(0o100_000), size: 1 << 40 },
        Record::Data { offset: 4096, length: 3 },
        Record::FileEnd,
        Record::Link { name: name("g"), first: vec![name("etc"), name("f")] },
        Record::Symlink { name: name("h"), meta: meta(0o120_000), target: b"../x".into() },
        Record::Node { name: name("null"), meta: meta(0o020_000), major: 1, minor: 3 },
        Record::Leave,
        Record::Remove { name: name("gone") },
        Record::End { entries: 7, bytes: 3 },
    ]
}

fn bytes(record: &Record) -> Vec<u8> {
    let mut out = Vec::new();
    record.encode(&mut out);
    out
}

#[test]
fn every_record_survives_and_every_prefix_asks_for_more() {
    for record in every_kind() {
        let whole = bytes(&record);
        for cut in 0..whole.len() {
            assert_eq!(Record::decode(&whole[..cut]).unwrap(), None, "{record:?} cut at {cut}");
        }
        let mut longer = whole.clone();
        longer.push(0xff);
        assert_eq!(Record::decode(&longer).unwrap(), Some((record, whole.len())));
    }
}

/// The bytes that version 1 stands for. A change here is a new version.
#[test]
fn the_bytes_of_a_file_never_change() {
    let record = Record::File { name: name("f"), meta: meta(0o100_000), size: 258 };
    let expected: &[u8] = &[
        4, // File
        1, 0, b'f', // name
        0xed, 0x89, 0, 0, // mode 0104755
        0xe8, 3, 0, 0, // uid
        100, 0, 0, 0, // gid
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, // -1 s
        0xff, 0xc9, 0x9a, 0x3b, // 999999999 ns
        1, 0, // one attribute
        6, 0, b'u', b's', b'e', b'r', b'.', b'a', 1, 0, 0, 0, b'v', // its name and value
        2, 1, 0, 0, 0, 0, 0, 0, // size
    ];
    assert_eq!(bytes(&record), expected);
}

#[test]
fn names_that_could_escape_are_refused() {
    for bad in [&b""[..], b".", b"..", b"a/b", b"/", b"/etc", b"a\0b", &[b'x'; 256]] {
        assert!(matches!(Name::new(bad), Err(Problem::Name { .. })), "{bad:?}");
    }
    for good in [&b"..."[..], b".a", b" ", b"\xff\xfe", &[b'x'; 255]] {
        assert!(Name::new(good).is_ok(), "{good:?}");
    }
}

#[test]
fn only_the_containers_own_attributes_move() {
    for (attribute, moves) in [
        ("user.mime", true),
        ("user.", false),
        ("user.overlay.opaque", true),
        ("security.capability", true),
        ("security.selinux", false),
        ("security.ima", false),
        ("system.posix_acl_access", true),
        ("system.posix_acl_default", true),
        ("system.nfs4_acl", false),
        ("trusted.md5sum", true),
        ("trusted.overlay.opaque", false),
        ("trusted.overlay.redirect", false),
    ] {
        assert_eq!(carried(attribute.as_bytes()), moves, "{attribute}");
    }
}

/// Takes a good record apart and puts a bad value in.
fn refused(record: Record) -> Problem {
    match Record::decode(&bytes(&record)) {
        Err(problem) => problem,
        Ok(decoded) => panic!("accepted {decoded:?}"),
    }
}

#[test]
fn values_that_make_no_sense_are_refused() {
    let file = |meta: Meta| Record::File { name: name("f"), meta, size: 0 };
    let good = meta(0o100_000);
    refused(file(Meta { mode: 0o040_755, ..good.clone() }));
    refused(file(Meta { mode: 0o1_100_644, ..good.clone() }));
    refused(file(Meta { uid: u32::MAX, ..good.clone() }));
    refused(file(Meta { gid: u32::MAX, ..good.clone() }));
    refused(file(Meta { modified: (0, 1_000_000_000), ..good.clone() }));
    refused(Record::File { name: name("f"), meta: good.clone(), size: 1 << 63 });
    refused(Record::Data { offset: 0, length: MAX_DATA as u32 + 1 });
    let device = meta(0o020_000);
    refused(Record::Node { name: name("w"), meta: device.clone(), major: 0, minor: 0 });
    refused(Record::Node { name: name("n"), meta: good.clone(), major: 0, minor: 0 });
    refused(Record::Symlink { name: name("s"), meta: meta(0o120_000), target: b"".into() });
    refused(Record::Symlink { name: name("s"), meta: meta(0o120_000), target: b"a\0".into() });
    let overlay = Attribute { name: b"trusted.overlay.opaque".into(), value: b"y".into() };
    refused(file(Meta { attributes: vec![overlay], ..good.clone() }));
    let long = Attribute { name: b"user.a".into(), value: vec![0; MAX_VALUE + 1] };
    refused(file(Meta { attributes: vec![long], ..good.clone() }));
    let full = Attribute { name: b"user.a".into(), value: vec![0; MAX_VALUE] };
    refused(file(Meta { attributes: vec![full; 17], ..good }));
}

/// A length is refused as soon as it is seen: its bytes never have to arrive,
/// and nothing is allocated for them.
#[test]
fn a_length_is_refused_before_its_bytes_arrive() {
    let mut huge_name = vec![tag::REMOVE];
    huge_name.extend(u16::MAX.to_le_bytes());
    assert!(matches!(Record::decode(&huge_name), Err(Problem::Limit { .. })));

    let plain = Meta { attributes: Vec::new(), ..meta(0o040_000) };
    let mut root = bytes(&Record::Root { replace: false, meta: plain });
    let count = root.len() - 2;
    root[count..].copy_from_slice(&u16::MAX.to_le_bytes());
    assert_eq!(Record::decode(&root).unwrap(), None);
    root.extend([6, 0]);
    root.extend(b"user.a");
    root.extend(u32::MAX.to_le_bytes());
    assert!(matches!(Record::decode(&root), Err(Problem::Limit { .. })));
}

#[test]
fn a_link_may_only_point_inside() {
    for path in ["", "/etc/passwd", "../f", "a//b", "a/../b", "a/", "."] {
        let mut out = vec![tag::LINK];
        put_text(&mut out, b"l");
        put_text(&mut out, path.as_bytes());
        assert!(matches!(Record::decode(&out), Err(Problem::Name { .. })), "{path:?}");
    }
}

#[test]
fn unknown_records_are_refused() {
    for unknown in [0, 12, 0xff] {
        assert_eq!(Record::decode(&[unknown]), Err(Problem::Record(unknown)));
    }
    assert!(matches!(Record::decode(&[tag::ROOT, 2]), Err(Problem::Limit { .. })));
}
