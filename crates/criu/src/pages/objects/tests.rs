use std::os::{fd::AsFd, unix::fs::MetadataExt};

use nix::sys::memfd::{MFdFlags, memfd_create};
use transship_types::PAGE;

use super::{
    super::{
        image::{FownEntry, IdExtent},
        tests::{ANONYMOUS, bytes, get, image, process, put, vma},
    },
    *,
};

/// Of a shared object, with status `VMA_AREA_MEMFD` and `MAP_SHARED`.
const SHARED: (u32, u32) = (0x01, 1 | 1 << 7 | 1 << 14);
const PRIVATE: (u32, u32) = (0x02, 1 | 1 << 6 | 1 << 14);

/// What CRIU writes of an object of which it saved nothing, and of one page.
const EMPTY: &str = "19435654 25400856 02000000 0803";
const SAVED: &str = "19435654 25400856 02000000 0803 08000000 0800 1000 2004 2801";

fn mapped(first: u64, kind: (u32, u32), file: u64, fdflags: Option<u32>) -> VmaEntry {
    VmaEntry { shmid: file, fdflags, prot: 3, ..vma(first, first + 3, kind) }
}

fn inode(id: u64, shmid: u32) -> MemfdInodeEntry {
    let (size, mode) = (3 * PAGE + 100, Some(0o100_640));
    MemfdInodeEntry {
        inode_id: id,
        shmid,
        size,
        mode,
        name: b"con tents".into(),
        ..Default::default()
    }
}

fn file(id: u32, inode_id: u32, flags: i32, pos: u64) -> FileEntry {
    let flags = (flags | libc::O_LARGEFILE) as u32;
    let memfd = MemfdFileEntry { id, inode_id, flags, pos, ..Default::default() };
    FileEntry { kind: MEMFD, id, memfd: Some(memfd) }
}

/// Images of process 1 with these mappings, files and inodes. CRIU has saved
/// something of object 78, and nothing of 77.
fn images(vmas: &[VmaEntry], files: &[Vec<u8>], inodes: &[MemfdInodeEntry]) -> MemoryDir {
    let dir = process(vmas, 1);
    let files: Vec<&[u8]> = files.iter().map(Vec::as_slice).collect();
    put(&dir, "files.img", &image(Type::Files, &files));
    let inodes: Vec<Vec<u8>> = inodes.iter().map(Message::encode_to_vec).collect();
    let inodes: Vec<&[u8]> = inodes.iter().map(Vec::as_slice).collect();
    put(&dir, "memfd.img", &image(Type::MemfdInode, &inodes));
    put(&dir, "pagemap-shmem-77.img", &bytes(EMPTY));
    put(&dir, "pagemap-shmem-78.img", &bytes(SAVED));
    dir
}

fn object() -> File {
    memfd_create(c"con tents", MFdFlags::MFD_ALLOW_SEALING).unwrap().into()
}

fn decoded<M: Message + Default>(dir: &MemoryDir, name: &str, kind: Type) -> Vec<M> {
    let mut all = Vec::new();
    each(dir, name, kind, |record| {
        all.push(M::decode(record).ok()?);
        Some(())
    })
    .unwrap();
    all
}

fn status_flags(file: impl AsFd) -> i32 {
    fcntl(file, FcntlArg::F_GETFL).unwrap() & (libc::O_ACCMODE | libc::O_APPEND)
}

#[test]
fn every_open_file_of_an_object_is_given_under_a_name_of_its_own() {
    let vmas = [
        mapped(10, SHARED, 5, Some(libc::O_RDWR as u32)),
        mapped(20, SHARED, 5, Some(libc::O_RDONLY as u32)),
        mapped(30, PRIVATE, 9, None),
        mapped(40, SHARED, 11, Some(libc::O_RDWR as u32)),
        VmaEntry { shmid: 5, ..vma(50, 51, ANONYMOUS) },
    ];
    // A regular file, with fields that nobody here knows.
    let regular = bytes("0801 1003 1a06 0803 1200 1a00 f23f03616263");
    let files = [
        regular.clone(),
        file(5, 4, libc::O_RDWR | libc::O_APPEND, 4711).encode_to_vec(),
        file(9, 4, libc::O_RDONLY, 12).encode_to_vec(),
        file(11, 6, libc::O_RDWR, 0).encode_to_vec(),
    ];
    let seals = (libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL) as u32;
    let dir = images(&vmas, &files, &[MemfdInodeEntry { seals, ..inode(4, 77) }, inode(6, 78)]);
    let untouched = get(&dir, "pagemap-shmem-77.img");
    let (ours, other) = (object(), object());
    let objects = BTreeMap::from([(77, ours.try_clone().unwrap()), (78, other)]);
    let given = give(&dir, &objects).unwrap();

    assert_eq!(given.left, [(78, "CRIU has saved it".to_owned())]);
    let keys: Vec<_> = given.files.iter().map(|one| one.key.as_str()).collect();
    assert_eq!(keys, [0, 1, 2, 3].map(|n| format!("/memfd:transship-{n}")));
    let (read, write) = (libc::O_RDONLY, libc::O_RDWR);
    let opened: Vec<_> = given.files.iter().map(|one| status_flags(&one.file)).collect();
    assert_eq!(opened, [write | libc::O_APPEND, read, read, write]);
    let position = |one: &Inherited| File::from(one.file.try_clone().unwrap()).stream_position();
    let positions: Vec<_> = given.files.iter().map(|one| position(one).unwrap()).collect();
    assert_eq!(positions, [4711, 12, 0, 0]);
    let meta = ours.metadata().unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o7777), (3 * PAGE + 100, 0o640));
    for one in &given.files {
        assert_eq!(File::from(one.file.try_clone().unwrap()).metadata().unwrap().ino(), meta.ino());
    }

    let inodes: Vec<MemfdInodeEntry> = decoded(&dir, "memfd.img", Type::MemfdInode);
    assert_eq!(inodes[..2], [MemfdInodeEntry { seals, ..inode(4, 77) }, inode(6, 78)]);
    let name = |id: u32| {
        let of = inodes.iter().find(|inode| inode.inode_id == u64::from(id)).unwrap();
        assert!(of.inode_id < 7 || (of.shmid, of.size) == (NO_IMAGE, 3 * PAGE + 100));
        String::from_utf8(of.name.clone()).unwrap()
    };
    let files: Vec<FileEntry> = decoded(&dir, "files.img", Type::Files);
    let names: Vec<_> = files
        .iter()
        .filter_map(|file| file.memfd.as_ref().map(|memfd| (file.id, name(memfd.inode_id))))
        .collect();
    let expected = [(5, 0), (9, 1), (12, 2), (13, 3)].map(|(id, n)| (id, format!("transship-{n}")));
    assert_eq!(names[..2], expected[..2]);
    assert_eq!(names[2], (11, "con tents".into()));
    assert_eq!(names[3..], expected[2..]);
    let first = Image::read(&dir, "files.img".into(), Type::Files).unwrap().unwrap();
    assert_eq!(first.records().next().unwrap().unwrap(), regular);
    // CRIU guesses how the private one was opened: for reading.
    let maps: Vec<MmEntry> = decoded(&dir, "mm-1.img", Type::Mm);
    let of: Vec<_> = maps[0].vmas.iter().map(|vma| vma.shmid).collect();
    assert_eq!(of, [13, 12, 12, 11, 5]);
    assert_eq!(get(&dir, "pagemap-shmem-77.img"), untouched);

    given.seals.apply().unwrap();
    assert_eq!(fcntl(&ours, FcntlArg::F_GET_SEALS).unwrap() as u32, seals);
}

#[test]
fn criu_makes_what_cannot_be_given() {
    type Spoil = fn(&mut VmaEntry, &mut FileEntry, &mut MemfdInodeEntry);
    let memfd: fn(&mut FileEntry) -> &mut MemfdFileEntry = |file| file.memfd.as_mut().unwrap();
    let cases: &[(&str, Spoil)] = &[
        ("another object", |_, _, inode| inode.shmid = 76),
        ("huge pages", |_, _, inode| inode.hugetlb_flag = Some(4)),
        ("a size that no file has", |_, _, inode| inode.size = u64::MAX),
        ("a position that no file has", |_, file, _| {
            file.memfd.as_mut().unwrap().pos = u64::MAX;
        }),
        ("O_PATH", |_, file, _| file.memfd.as_mut().unwrap().flags = libc::O_PATH as u32),
        ("signals", |_, file, _| {
            file.memfd.as_mut().unwrap().fown = FownEntry { pid: 1, ..Default::default() };
        }),
        ("sealed and mapped", |_, _, inode| inode.seals = libc::F_SEAL_WRITE as u32),
    ];
    for (case, spoil) in cases {
        let (mut vma, mut inode) = (mapped(10, SHARED, 5, Some(2)), inode(4, 77));
        let mut file = file(5, 4, libc::O_RDWR, 0);
        assert_eq!(memfd(&mut file).id, 5);
        spoil(&mut vma, &mut file, &mut inode);
        let dir = images(&[vma], &[file.encode_to_vec()], &[inode]);
        let names = ["memfd.img", "files.img", "mm-1.img"];
        let before = names.map(|name| get(&dir, name));
        let given = give(&dir, &BTreeMap::from([(77, object())])).unwrap();
        assert_eq!((given.files.len(), given.left.len()), (0, 1), "{case}");
        assert!(given.left[0].0 == 77 && !given.left[0].1.is_empty(), "{case}");
        assert_eq!(names.map(|name| get(&dir, name)), before, "{case}");
    }
}

#[test]
fn no_more_files_are_given_than_a_request_carries() {
    let files: Vec<_> = (1..=MAX_INHERITED as u32 + 1)
        .map(|id| file(id, 4, libc::O_RDONLY, 0).encode_to_vec())
        .collect();
    for (count, given) in [(MAX_INHERITED, MAX_INHERITED), (MAX_INHERITED + 1, 0)] {
        let dir = images(&[], &files[..count], &[inode(4, 77)]);
        let all = give(&dir, &BTreeMap::from([(77, object())])).unwrap();
        assert_eq!((all.files.len(), all.left.len()), (given, usize::from(given == 0)));
    }
}

#[test]
fn images_that_cannot_be_read_are_errors() {
    for name in ["memfd.img", "files.img", "mm-1.img"] {
        let dir = images(&[mapped(10, SHARED, 5, None)], &[], &[inode(4, 77)]);
        let mut broken = get(&dir, name);
        broken.extend([3, 0, 0, 0, 0xff, 0xff, 0xff]);
        dir.remove(name).unwrap();
        put(&dir, name, &broken);
        let error = give(&dir, &BTreeMap::from([(77, object())])).err().unwrap();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn owners_are_those_outside_of_the_user_namespace() {
    let owned = MemfdInodeEntry { uid: 5, gid: 0, ..inode(4, 77) };
    let extent = |first, lower_first, count| IdExtent { first, lower_first, count };
    let (users, groups) =
        (vec![extent(0, 1000, 3), extent(3, 70_000, 9)], vec![extent(0, 4000, 1)]);
    for (users, left) in [(users, 0), (vec![extent(0, 1000, 5)], 1), (vec![extent(0, 9, 0)], 1)] {
        let dir = images(
            &[],
            &[file(5, 4, libc::O_RDWR, 0).encode_to_vec()],
            std::slice::from_ref(&owned),
        );
        let namespace = UserNsEntry { users, groups: groups.clone() }.encode_to_vec();
        put(&dir, "userns-10.img", &image(Type::UserNs, &[&namespace]));
        let object = object();
        let objects = BTreeMap::from([(77, object.try_clone().unwrap())]);
        assert_eq!(give(&dir, &objects).unwrap().left.len(), left);
        if left == 0 {
            let meta = object.metadata().unwrap();
            assert_eq!((meta.uid(), meta.gid()), (70_002, 4000));
        }
    }
}

/// Nobody could shorten it where it was; a memfd of that name is another thing.
#[test]
fn what_was_anonymous_stays_as_long_as_it_is() {
    let named = MemfdInodeEntry { name: b"/dev/zero".into(), seals: 1, ..inode(4, 77) };
    let memfd = MemfdFileEntry { id: 5, inode_id: 4, ..Default::default() };
    let never_open = FileEntry { kind: MEMFD, id: 5, memfd: Some(memfd) };
    let open = file(5, 4, libc::O_RDWR, 0);
    for (file, shrinks) in [(never_open, false), (open, true)] {
        let dir = images(&[], &[file.encode_to_vec()], std::slice::from_ref(&named));
        let object = object();
        let objects = BTreeMap::from([(77, object.try_clone().unwrap())]);
        give(&dir, &objects).unwrap().seals.apply().unwrap();
        assert_eq!(object.set_len(0).is_ok(), shrinks);
    }
}

#[test]
fn a_process_that_is_listed_twice_is_refused() {
    let dir = images(&[mapped(10, SHARED, 5, None)], &[], &[inode(4, 77)]);
    let objects = || BTreeMap::from([(77, object())]);
    give(&dir, &objects()).unwrap();
    let tree = get(&dir, "pstree.img");
    dir.remove("pstree.img").unwrap();
    // Its records once more, behind the magic.
    put(&dir, "pstree.img", &[&tree[..], &tree[8..]].concat());
    assert!(give(&dir, &objects()).is_err());
}
