use std::io::{Read, Write};

use super::{
    image::{MmEntry, Type, VmaEntry},
    *,
};
use crate::images::MemoryDir;
use transship_types::{PAGE, PageSet};

/// As CRIU 4.2.1 wrote it for a process of which it saved the vDSO alone.
const PAGEMAP_42: &str = "19435654 25400856 02000000 0801 0e000000 088080fca992f91f 1000 2004 2802";
/// The same in the form of CRIU 4.1.
const PAGEMAP_41: &str = "19435654 25400856 02000000 0801 0c000000 088080fca992f91f 1002 2004";

pub(super) fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    let text = |pair: &[u8]| String::from_utf8(pair.to_vec()).unwrap();
    digits.chunks(2).map(|pair| u8::from_str_radix(&text(pair), 16).unwrap()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn put(dir: &MemoryDir, name: &str, bytes: &[u8]) {
    dir.create_file(name).unwrap().write_all(bytes).unwrap();
}

pub(super) fn get(dir: &MemoryDir, name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    dir.open(name).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

pub(super) fn image(kind: Type, records: &[&[u8]]) -> Vec<u8> {
    let mut image = bytes("19435654");
    image.extend((kind as u32).to_le_bytes());
    for record in records {
        image.extend((record.len() as u32).to_le_bytes());
        image.extend_from_slice(record);
    }
    image
}

fn range(first: u64, last: u64) -> PageRange {
    PageRange::new(first * PAGE, last * PAGE).unwrap()
}

fn set(ranges: &[(u64, u64)]) -> PageSet {
    ranges.iter().map(|&(first, last)| range(first, last)).collect()
}

pub(super) const ANONYMOUS: (u32, u32) = (0x22, 1 | 1 << 9);
const LOCKED: (u32, u32) = (0x2022, 1 | 1 << 9);
const HUGE: (u32, u32) = (0x40022, 1 | 1 << 9);
const FILE_PRIVATE: (u32, u32) = (0x02, 1 | 1 << 6);
const FILE_SHARED: (u32, u32) = (0x01, 1 | 1 << 7);
const VDSO_MAP: (u32, u32) = (0x22, 1 | 1 << 3 | 1 << 9);
const SHADOW_STACK: (u32, u32) = (0x22, 1 | 1 << 9 | 1 << 15);

pub(super) fn vma(first: u64, last: u64, (flags, status): (u32, u32)) -> VmaEntry {
    let (start, end) = (first * PAGE, last * PAGE);
    VmaEntry { start, end, flags, status, fd: -1, ..Default::default() }
}

/// Process 1 with the thread 5, whose stack pointer is in page `stack`.
pub(super) fn process(vmas: &[VmaEntry], stack: u64) -> MemoryDir {
    use super::image::{CoreEntry, PstreeEntry, RegistersX86, ThreadInfoX86};
    use prost::Message;
    let dir = MemoryDir::create(None).unwrap();
    let tree = PstreeEntry { pid: 1, threads: vec![1, 5] }.encode_to_vec();
    let zombie = PstreeEntry { pid: 7, threads: vec![7] }.encode_to_vec();
    put(&dir, "pstree.img", &image(Type::Pstree, &[&tree, &zombie]));
    let mm = MmEntry { vmas: vmas.to_vec() }.encode_to_vec();
    put(&dir, "mm-1.img", &image(Type::Mm, &[&mm]));
    for (thread, sp) in [(1, u64::MAX), (5, stack * PAGE + 8)] {
        let registers = Some(RegistersX86 { sp });
        let core = CoreEntry { x86: Some(ThreadInfoX86 { registers }), aarch64: None };
        let core = image(Type::Core, &[&core.encode_to_vec()]);
        put(&dir, &format!("core-{thread}.img"), &core);
    }
    dir
}

fn pagemap(dir: &MemoryDir, entries: &[&str], pages: &[u8]) {
    let entries: Vec<Vec<u8>> = entries.iter().map(|entry| bytes(entry)).collect();
    let entries: Vec<&[u8]> = entries.iter().map(Vec::as_slice).collect();
    put(dir, "pagemap-1.img", &image(Type::Pagemap, &entries));
    put(dir, "pages-3.img", pages);
}

/// A page of the low byte of its number, as the container would have it.
fn fetch(range: PageRange, into: &mut [u8]) -> std::io::Result<()> {
    for (index, page) in into.chunks_mut(PAGE as usize).enumerate() {
        page.fill((range.start() / PAGE) as u8 + index as u8);
    }
    Ok(())
}

fn firsts(pages: &[u8]) -> Vec<u8> {
    assert!(pages.len().is_multiple_of(PAGE as usize));
    pages.chunks(PAGE as usize).map(|page| page[0]).collect()
}

/// It has two bytes for each, and would take a hundred times as much.
#[test]
fn mappings_without_end_are_not_decoded() {
    let dir = process(&[], 1);
    let layouts = |mm: &[u8]| {
        dir.remove("mm-1.img").unwrap();
        put(&dir, "mm-1.img", &image(Type::Mm, &[mm]));
        layout(&dir).unwrap_err().to_string()
    };
    let empty = [14 << 3 | 2, 0];
    let said = layouts(&empty.repeat(1 << 20));
    assert!(said.contains("is no range of pages"), "so many there may be: {said}");
    let said = layouts(&empty.repeat((1 << 20) + 1));
    assert!(said.contains("too many fields"), "{said}");
    // One field of more bytes than all mappings have.
    let long = [&[15 << 3 | 2, 0x80, 0x80, 0x80, 0x20][..], &[0; 64 << 20]].concat();
    let said = layouts(&long);
    assert!(said.contains("too large"), "{said}");
}

#[test]
fn nobody_is_restored_twice() {
    use super::image::PstreeEntry;
    use prost::Message;
    let one = |pid, threads: &[u32]| PstreeEntry { pid, threads: threads.into() }.encode_to_vec();
    for (case, twice) in
        [("a process", [one(1, &[1]), one(1, &[2])]), ("a thread", [one(1, &[1, 5]), one(2, &[5])])]
    {
        let dir = MemoryDir::create(None).unwrap();
        put(&dir, "pstree.img", &image(Type::Pstree, &[&twice[0], &twice[1]]));
        let error = layout(&dir).expect_err(case).to_string();
        assert!(error.contains("twice"), "{case}: {error}");
    }
}

#[test]
fn lazy_is_what_criu_makes_lazy() {
    let kinds = [ANONYMOUS, LOCKED, HUGE, FILE_PRIVATE, FILE_SHARED, VDSO_MAP, SHADOW_STACK];
    let mut vmas: Vec<_> =
        (0..).zip(kinds).map(|(at, kind)| vma(10 * at + 10, 10 * at + 15, kind)).collect();
    vmas.push(vma(90, 91, (0, 1 << 16)));
    let mut vsyscall = vma(0, 1, (0x22, 1 << 2));
    (vsyscall.start, vsyscall.end) = (0xffff_ffff_ff60_0000, 0xffff_ffff_ff60_1000);
    vmas.push(vsyscall);
    let dir = process(&vmas, 12);
    let layouts = layout(&dir).unwrap();
    let [process] = layouts.as_slice() else { panic!("{layouts:?}") };
    assert_eq!((process.vpid, &process.stacks), (1, &set(&[(12, 13)])));
    let of = |pick: fn(&Vma) -> bool| process.vmas.iter().map(pick).collect::<Vec<_>>();
    assert_eq!(of(|vma| vma.lazy), [true, false, false, false, false, false, false]);
    assert_eq!(of(|vma| vma.private), [true, true, true, true, false, true, true]);
}

/// CRIU registers it all the same, and restores what is in the image before.
#[test]
fn what_is_wiped_on_fork_is_restored_at_once() {
    let advised = |first, advice: u32| VmaEntry {
        madv: Some(1 << advice),
        ..vma(first, first + 5, ANONYMOUS)
    };
    // MADV_DONTFORK: a child has no such mapping that could be filled.
    let dir = process(&[advised(10, 10), advised(20, 18)], 40);
    pagemap(&dir, &["0803"], &[]);
    let process = layout(&dir).unwrap().remove(0);
    assert_eq!(process.vmas.iter().map(|vma| vma.lazy).collect::<Vec<_>>(), [true, false]);
    let completed = complete(&dir, &process, &set(&[(12, 14), (22, 25)]), &mut fetch).unwrap();
    assert_eq!((completed.lazy, completed.eager_pages), (set(&[(12, 14)]), 3));
}

#[test]
fn each_page_gets_one_place_in_order() {
    let vmas = [vma(10, 20, ANONYMOUS), vma(30, 40, FILE_PRIVATE), vma(50, 60, LOCKED)];
    let dir = process(&vmas, 19);
    // CRIU has saved pages 35 and 36, and 12, which it marked lazy.
    let saved: Vec<u8> = [112, 135, 136].iter().flat_map(|&n| [n; PAGE as usize]).collect();
    pagemap(&dir, &["0803", "0880800310002006 2801", "0880e00810022004"], &saved);
    let process = layout(&dir).unwrap().remove(0);
    let present = set(&[(11, 14), (18, 20), (33, 38), (55, 56), (70, 72)]);
    let completed = complete(&dir, &process, &present, &mut fetch).unwrap();
    assert_eq!(completed.lazy, set(&[(11, 12), (13, 14), (18, 19)]));
    assert_eq!(completed.eager_pages, 5);
    assert_eq!(completed.criu_pages, 3);
    assert_eq!(completed.unplaced_pages, 2);
    assert_eq!(firsts(&get(&dir, "pages-3.img")), [112, 19, 33, 34, 135, 136, 37, 55]);
    assert_eq!(
        hex(&get(&dir, "pagemap-1.img")),
        hex(&bytes(
            "19435654 25400856 02000000 0803
             0a000000 08 8080 03 1001 2004 2801 0a000000 08 80e0 04 1001 2004 2801
             0a000000 08 80a0 08 1002 2004 2802 0a000000 08 80e0 08 1002 2004 2802
             0a000000 08 80a0 09 1001 2004 2801 0a000000 08 80e0 0d 1001 2004 2801"
        ))
    );
    // Again, as after a try that failed later: all is there.
    let again = complete(&dir, &process, &present, &mut fetch).unwrap();
    assert_eq!((again.eager_pages, again.criu_pages), (0, 8));
    assert_eq!(again.lazy, completed.lazy);
}

#[test]
fn both_forms_of_a_pagemap_are_read() {
    for form in [PAGEMAP_42, PAGEMAP_41] {
        let dir = process(&[vma(10, 20, ANONYMOUS)], 0);
        put(&dir, "pagemap-1.img", &bytes(form));
        let process = layout(&dir).unwrap().remove(0);
        let present = set(&[(11, 13)]);
        let completed = complete(&dir, &process, &present, &mut fetch).unwrap();
        assert_eq!((completed.lazy, completed.criu_pages), (present, 2), "{form}");
        assert_eq!(get(&dir, "pagemap-1.img"), bytes(form), "nothing had to be written");
    }
}

#[test]
fn a_failed_fetch_is_told_with_its_place() {
    let dir = process(&[vma(30, 40, FILE_PRIVATE)], 0);
    pagemap(&dir, &["0803"], b"");
    let process = layout(&dir).unwrap().remove(0);
    let mut fetch = |_: PageRange, _: &mut [u8]| Err(std::io::ErrorKind::NotFound.into());
    let error = complete(&dir, &process, &set(&[(30, 32)]), &mut fetch).unwrap_err();
    assert_eq!(error.to_string(), "fetching 0x1e000..0x20000 of process 1");
}

#[test]
fn hostile_images_are_errors() {
    let whole = "19435654 25400856 02000000 0803 ";
    for (what, pagemap) in [
        ("nothing", String::new()),
        ("another type", "19435654 30302750".into()),
        ("no head", "19435654 25400856".into()),
        ("a record that ends too late", format!("{whole} ffffffff 08")),
        ("half a length", format!("{whole} 0100")),
        ("noise", format!("{whole} 02000000 ffff")),
        ("a parent", format!("{whole} 08000000 08 8080 03 1001 2001")),
        ("too many pages", format!("{whole} 13000000 08 8080 03 1000 2004 28ffffffffffffffffff01")),
        ("no pages", format!("{whole} 08000000 08 8080 03 1000 2004")),
        ("half a page", format!("{whole} 06000000 0801 1001 2004")),
        (
            "the wrong order",
            format!("{whole} 08000000 08 8080 03 1001 2004 08000000 08 8080 03 1001 2004"),
        ),
        ("fewer pages than said", format!("{whole} 08000000 08 8080 03 1001 2004")),
    ] {
        let dir = process(&[vma(10, 20, LOCKED)], 0);
        put(&dir, "pagemap-1.img", &bytes(&pagemap));
        put(&dir, "pages-3.img", b"short");
        let process = layout(&dir).unwrap().remove(0);
        let completed = complete(&dir, &process, &set(&[(15, 16)]), &mut fetch);
        assert!(matches!(completed, Err(PagesError::Image { .. })), "{what}: {completed:?}");
    }
    let dir = process(&[vma(10, 20, ANONYMOUS), vma(15, 30, ANONYMOUS)], 0);
    assert!(layout(&dir).unwrap_err().to_string().contains("not in order"));
    let dir = process(&[vma(20, 10, ANONYMOUS)], 0);
    assert!(layout(&dir).unwrap_err().to_string().contains("no range"));
    assert!(layout(&MemoryDir::create(None).unwrap()).is_err());
}

#[test]
fn guards_are_added_once_and_last() {
    let dir = process(&[vma(10, 20, ANONYMOUS), vma(12, 13, (0, 1 << 16))], 0);
    let before = get(&dir, "mm-1.img");
    add_guards(&dir, 1, &set(&[(12, 13)])).unwrap();
    assert_eq!(get(&dir, "mm-1.img"), before);
    add_guards(&dir, 1, &set(&[(12, 13), (16, 18)])).unwrap();
    let after = get(&dir, "mm-1.img");
    assert_eq!(after[12..before.len()], before[12..], "what was there stays");
    let added = "7216 088080 04 10 80c0 04 1800 2000 2800 3000 38 8080 04 4001";
    assert_eq!(hex(&after[before.len()..]), hex(&bytes(added)));
    assert_eq!(layout(&dir).unwrap()[0].vmas.len(), 1);
    // A zombie has no mappings to guard.
    add_guards(&dir, 7, &set(&[(1, 2)])).unwrap();
}

/// As CRIU 4.2.1 wrote them in the container's network namespace; outside of
/// it, it counts the container's as another one.
#[test]
fn images_say_whose_network_it_is() {
    let own = "16313158 4e000000 08021001 1a18 0801100118012001280130023803400448065007580860052001
               280130005801 6200 6a24 66313462383634642d333163642d346430642d623466382d633137383037
               363234623833";
    let ids = "19435654 30204354 18000000 080210021802200228093002380a400b480c500758086005";
    for (of_container, shared) in [("3002", true), ("3009", false)] {
        let dir = process(&[], 0);
        put(&dir, "ids-1.img", &bytes(&ids.replace("3002", of_container)));
        put(&dir, "inventory.img", &bytes(own));
        assert_eq!(shares_network(&dir).unwrap(), shared);
    }
    assert!(shares_network(&process(&[], 0)).is_err());
}

/// As CRIU 4.2.1 writes it for an object that it found empty.
const EMPTY: &str = "19435654 25400856 02000000 0803";

/// A file with the pages of `present` at their offsets.
fn contents(dir: &MemoryDir, present: &PageSet) {
    use std::os::unix::fs::FileExt;
    let file = dir.create_file("contents").unwrap();
    for range in present.iter() {
        let mut bytes = vec![0; range.bytes() as usize];
        fetch(range, &mut bytes).unwrap();
        file.write_all_at(&bytes, range.start()).unwrap();
    }
}

#[test]
fn a_shared_object_that_criu_found_empty_gets_its_pages() {
    for (present, firsts_are, entries) in [
        (
            set(&[(1, 3), (300, 301)]),
            vec![1, 2, 44],
            "09000000 08 8020 1002 2004 2802 0a000000 08 80804b 1001 2004 2801",
        ),
        // One hole among many pages is not worth copying all the others.
        (
            set(&[(0, 2), (3, 12)]),
            vec![0, 1, 0, 3, 4, 5, 6, 7, 8, 9, 10, 11],
            "08000000 0800 100c 2004 280c",
        ),
    ] {
        let dir = MemoryDir::create(None).unwrap();
        put(&dir, "pagemap-shmem-77.img", &bytes(EMPTY));
        put(&dir, "pages-3.img", b"");
        contents(&dir, &present);
        let done = complete_shared(&dir, 77, &present, Contents::Image("contents")).unwrap();
        assert_eq!(done, CompletedShared { pages: present.pages(), criu_pages: 0 });
        assert_eq!(firsts(&get(&dir, "pages-3.img")), firsts_are);
        let pagemap = hex(&get(&dir, "pagemap-shmem-77.img"));
        assert_eq!(pagemap, hex(&bytes(&format!("{EMPTY} {entries}"))));
        assert!(dir.open("contents").is_err());
    }
}

#[test]
fn a_shared_object_that_criu_saved_stays_as_it_is() {
    let dir = MemoryDir::create(None).unwrap();
    let saved = format!("{EMPTY} 08000000 0800 1000 2004 2802");
    put(&dir, "pagemap-shmem-77.img", &bytes(&saved));
    put(&dir, "pages-3.img", &[9; 2 * PAGE as usize]);
    contents(&dir, &set(&[(0, 5)]));
    let done = complete_shared(&dir, 77, &set(&[(0, 5)]), Contents::Image("contents")).unwrap();
    assert_eq!(done, CompletedShared { pages: 0, criu_pages: 2 });
    assert_eq!(get(&dir, "pagemap-shmem-77.img"), bytes(&saved));
    assert_eq!(get(&dir, "pages-3.img"), [9; 2 * PAGE as usize]);
    assert!(dir.open("contents").is_err());
}

/// One of no size has no image; any other would be lost.
#[test]
fn a_shared_object_that_criu_does_not_know_is_an_error() {
    let dir = MemoryDir::create(None).unwrap();
    let done = complete_shared(&dir, 77, &PageSet::new(), Contents::Image("contents")).unwrap();
    assert_eq!(done, CompletedShared::default());
    contents(&dir, &set(&[(0, 1)]));
    let error =
        complete_shared(&dir, 77, &set(&[(0, 1)]), Contents::Image("contents")).unwrap_err();
    assert!(error.to_string().contains("pagemap-shmem-77.img"), "{error}");
    put(&dir, "pagemap-shmem-77.img", &bytes("19435654 25400856 02000000 0803 0100"));
    let error =
        complete_shared(&dir, 77, &set(&[(0, 1)]), Contents::Image("contents")).unwrap_err();
    assert!(matches!(error, PagesError::Image { .. }), "{error}");
}

#[test]
fn contents_that_lie_elsewhere_are_copied_into_the_image() {
    let dir = MemoryDir::create(None).unwrap();
    let elsewhere = MemoryDir::create(None).unwrap();
    let present = set(&[(0, 2), (300, 301)]);
    contents(&elsewhere, &present);
    put(&dir, "pagemap-shmem-77.img", &bytes(EMPTY));
    put(&dir, "pages-3.img", b"");
    let file = elsewhere.open("contents").unwrap();
    let done = complete_shared(&dir, 77, &present, Contents::Open(&file)).unwrap();
    assert_eq!(done, CompletedShared { pages: 3, criu_pages: 0 });
    assert_eq!(firsts(&get(&dir, "pages-3.img")), [0, 1, 44]);
}
