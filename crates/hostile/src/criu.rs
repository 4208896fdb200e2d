//! What CRIU, or a peer in its name, has written: images, packets, archives.

use std::{
    fs::{self, File},
    io::{Seek, Write},
    os::unix::fs::{MetadataExt, symlink},
};

use flate2::{Compression, write::GzEncoder};
use transship_criu::{
    Remembered,
    fields::Fields,
    fuzz,
    images::MemoryDir,
    pages::{self, add_guards},
};
use transship_types::{PAGE, PageRange, PageSet};

/// The images that are read on a target, and what each begins with.
const IMAGES: [(&str, &[u32]); 9] = [
    ("pstree.img", &[COMMON, 0x5027_3030]),
    ("mm-1.img", &[COMMON, 0x5749_2820]),
    ("core-1.img", &[COMMON, 0x5505_3847]),
    ("pagemap-1.img", &[COMMON, 0x5608_4025]),
    ("pagemap-shmem-7.img", &[COMMON, 0x5608_4025]),
    ("inventory.img", &[0x5831_3116]),
    ("ids-1.img", &[COMMON, 0x5443_2030]),
    ("pages-1.img", &[]),
    (Remembered::FILE, &[]),
];
const COMMON: u32 = 0x5456_4319;

/// So large may all of them get: what they say of holes would fill a machine.
const ROOM: u64 = 4 << 20;

/// Images, each as its number in the list, a length of two bytes, and so many
/// bytes after what it begins with.
pub fn images(mut bytes: &[u8]) {
    let dir = MemoryDir::create(Some(ROOM)).expect("a tmpfs");
    while let Some((head, rest)) = bytes.split_first_chunk::<3>() {
        let (name, magic) = IMAGES[usize::from(head[0]) % IMAGES.len()];
        let length = usize::from(u16::from_le_bytes([head[1], head[2]])).min(rest.len());
        let (content, rest) = rest.split_at(length);
        bytes = rest;
        // The same image again is not let in.
        let Ok(mut file) = dir.create_file(name) else { continue };
        let magic: Vec<u8> = magic.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all(&magic).and_then(|()| file.write_all(content)).expect("room");
    }
    let _ = Remembered::read(&dir.path());
    let _ = pages::shares_network(&dir);
    let present = set(&[(16, 20), (0x7fff_0000, 0x7fff_0003)]);
    let _ = add_guards(&dir, 1, &set(&[(17, 18)]));
    for layout in pages::layout(&dir).unwrap_or_default() {
        let ordered = layout.vmas.windows(2).all(|two| two[0].range.end() <= two[1].range.start());
        assert!(ordered, "mappings that overlap");
        let mut fetch = |range: PageRange, into: &mut [u8]| {
            assert_eq!(into.len() as u64, range.bytes());
            into.fill(1);
            Ok(())
        };
        if let Ok(done) = pages::complete(&dir, &layout, &present, &mut fetch) {
            let counted = done.lazy.pages() + done.eager_pages + done.unplaced_pages;
            assert!(counted <= present.pages(), "more pages than there are");
        }
    }
    let contents = dir.create_file("contents").and_then(|mut file| {
        let _ = file.write_all(&[7; 2 * PAGE as usize]);
        dir.set_len("contents", 4 * PAGE)
    });
    if contents.is_ok() {
        let _ = pages::complete_shared(
            &dir,
            7,
            &set(&[(0, 2), (3, 4)]),
            pages::Contents::Image("contents"),
        );
    }
}

fn set(ranges: &[(u64, u64)]) -> PageSet {
    ranges.iter().flat_map(|&(first, last)| PageRange::new(first * PAGE, last * PAGE)).collect()
}

/// Small messages, field by field.
fn message(fields: &[(u32, u64)]) -> Vec<u8> {
    let mut message = Fields::default();
    fields.iter().for_each(|&(number, value)| message.set_varint(number, value));
    message.encode()
}

fn with(number: u32, inner: &[u8]) -> Vec<u8> {
    let mut outer = Fields::default();
    outer.add_bytes(number, inner);
    outer.encode()
}

/// Records, each after its length.
fn image(kind: u8, records: &[Vec<u8>]) -> Vec<u8> {
    let body: Vec<u8> = records
        .iter()
        .flat_map(|record| [&(record.len() as u32).to_le_bytes()[..], record].concat())
        .collect();
    file(kind, &body)
}

fn file(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind], &(body.len() as u16).to_le_bytes()[..], body].concat()
}

pub fn image_seeds() -> Vec<Vec<u8>> {
    let vma = |start: u64, end: u64, flags| {
        let fields = [(1, start * PAGE), (2, end * PAGE), (3, 0), (4, 0), (5, 3), (6, flags)];
        message(&[&fields[..], &[(7, 1 | 1 << 9), (8, 1)]].concat())
    };
    let mm = [with(14, &vma(16, 18, 0x22)), with(14, &vma(18, 24, 0x2022))].concat();
    let entry = message(&[(1, 17 * PAGE), (2, 1), (4, 4), (5, 1)]);
    let base = [
        image(0, &[message(&[(1, 1), (2, 0), (3, 1), (4, 1), (5, 1)])]),
        image(1, &[mm]),
        image(2, &[with(2, &with(2, &message(&[(20, 0x7fff_0000 * PAGE)])))]),
        image(5, &[with(3, &message(&[(6, 1)]))]),
        image(6, &[message(&[(6, 2)])]),
    ]
    .concat();
    let saved = image(3, &[message(&[(1, 1)]), entry.clone()]);
    let none = image(3, &[message(&[(1, 1)])]);
    let shared = image(4, &[message(&[(1, 2)])]);
    let kept = image(4, &[message(&[(1, 2)]), entry]);
    let bytes = file(7, &[9; PAGE as usize]);
    let said = file(8, br#"{"tcp_established":true}"#);
    vec![
        [&base[..], &saved, &bytes, &shared, &said].concat(),
        [&base[..], &none, &kept].concat(),
        base,
    ]
}

pub fn rpc(bytes: &[u8]) {
    fuzz::packet(bytes);
}

pub fn rpc_seeds() -> Vec<Vec<u8>> {
    let mut options = Fields::parse(&message(&[(1, 5), (3, 1), (52, 0)])).expect("a message");
    options.add_bytes(37, b"mnt[/etc/hosts]:/etc/hosts");
    options.add_bytes(27, &with(1, b"pipe:[1]"));
    let request = |kind| [message(&[(1, kind)]), with(2, &options.encode())].concat();
    let mut notify = Fields::parse(&message(&[(2, 17)])).expect("a message");
    notify.add_bytes(1, b"post-dump");
    let notification = [message(&[(1, 6), (2, 1)]), with(5, &notify.encode())].concat();
    let answer = [message(&[(1, 2), (2, 1)]), with(4, &message(&[(1, 17)]))].concat();
    vec![request(1), request(2), notification, answer]
}

/// An archive as tar has it, or compressed if the first byte is odd.
pub fn tar(bytes: &[u8]) {
    let Some((how, bytes)) = bytes.split_first() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let (root, beside) = (dir.path().join("root"), dir.path().join("beside"));
    fs::create_dir(&root).expect("a directory");
    fs::write(&beside, "secret").expect("a file");
    symlink("..", root.join("up")).expect("a link");
    let mut archive = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.path().join("archive"))
        .expect("a file");
    if how % 2 == 1 {
        archive.write_all(bytes).expect("room");
    } else {
        let mut compressed = GzEncoder::new(&archive, Compression::none());
        compressed.write_all(bytes).and_then(|()| compressed.finish().map(drop)).expect("room");
    }
    archive.rewind().expect("a file");
    let _ = fuzz::extract(&archive, &root);
    let names = fs::read_dir(dir.path()).expect("a directory").count();
    let meta = fs::metadata(&beside).expect("a file");
    assert_eq!((names, meta.len(), meta.nlink()), (3, 6, 1), "something outside was reached");
}

pub fn tar_seeds() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join("from").join(name);
    fs::create_dir_all(at("a/b")).expect("a directory");
    fs::write(at("a/b/text"), "text").expect("a file");
    fs::hard_link(at("a/b/text"), at("again")).expect("a name");
    fs::write(at(&"long".repeat(40)), "long").expect("a file");
    symlink("/etc/no/such", at("link")).expect("a link");
    let path = dir.path().join("archive");
    fuzz::archive(&dir.path().join("from"), &File::create(&path).expect("a file")).expect("one");
    let compressed = fs::read(path).expect("a file");
    let mut plain = vec![0];
    let mut decoder = flate2::read::GzDecoder::new(&compressed[..]);
    std::io::Read::read_to_end(&mut decoder, &mut plain).expect("what was written");
    vec![plain, [&[1], &compressed[..]].concat()]
}
