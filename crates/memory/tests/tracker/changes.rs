//! What a program does to its memory is noticed, and nothing else is.

use transship_memory::{Backend, Dirty, Memory, Tracker, Want};
use transship_types::{PAGE, PageRange};

use crate::{
    store::Store,
    sys,
    target::{Target, session, space, tracker, until},
};

fn page(range: PageRange, index: u64) -> PageRange {
    PageRange::of_pages(range.start() + index * PAGE, 1).unwrap()
}

/// How many pages of the range are named.
fn named(dirty: &Dirty, pid: i32, range: PageRange) -> u64 {
    let spaces = dirty.spaces.iter().filter(|(named, _)| *named == space(pid));
    spaces.flat_map(|(_, pages)| pages.within(range)).map(PageRange::pages).sum()
}

fn written(tracker: &Tracker, target: &Target, range: PageRange) -> u64 {
    named(&tracker.round().unwrap(), target.pid(), range)
}

#[test]
fn what_is_written_is_named_once() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 64);
    let tracker = target.tracker();
    assert_eq!(tracker.backend(), Backend::WriteProtect);
    assert_eq!(written(&tracker, &target, memory), 64, "all at first");
    assert_eq!(written(&tracker, &target, memory), 0);
    target.write(page(memory, 3), 7);
    target.to("look", memory, 0);
    assert!(tracker.peek().unwrap() > 0);
    assert_eq!(named(&tracker.last().unwrap().dirty, target.pid(), memory), 1);
    let dirty = tracker.round().unwrap();
    assert_eq!(named(&dirty, target.pid(), page(memory, 3)), 1, "neither of them reset it");
    assert_eq!(named(&dirty, target.pid(), memory), 1);
    assert_eq!(written(&tracker, &target, memory), 0);
}

#[test]
fn every_kind_of_private_memory_is_watched() {
    for kind in ["anonymous", "thp", "file", "locked", "huge"] {
        let mut target = Target::start();
        // A page of 2 MiB is one to the kernel.
        let (pages, unit) = if kind == "huge" { (1024, 512) } else { (1024, 1) };
        let Some(memory) = target.try_map(kind, pages) else {
            assert_eq!(kind, "huge");
            eprintln!("NOT TESTED: no huge pages are set aside (vm.nr_hugepages)");
            continue;
        };
        let tracker = target.tracker();
        let mut store = Store::default();
        for (write, expected) in [(false, pages), (false, 0), (true, unit), (false, 0)] {
            if write {
                target.write(page(memory, 600), 7);
            }
            let dirty = tracker.round().unwrap();
            assert_eq!(named(&dirty, target.pid(), memory), expected, "{kind}");
            store.take(&tracker, &dirty);
        }
        assert_eq!(tracker.statistics().unwatched, [], "{kind}");
        target.halt();
        store.check(&tracker);
    }
}

/// CRIU borrows the begin of a task's code after the last scan, while the
/// pages that it named are still being read.
#[test]
fn the_begin_of_code_is_read_with_the_last_scan() {
    let mut target = Target::start();
    let code = target.map("code", 4);
    let tracker = target.tracker();
    let last = tracker.last().unwrap();
    assert_eq!(named(&last.dirty, target.pid(), code), 4);
    let space = target.space();
    let read = || {
        let mut bytes = vec![0; code.bytes() as usize];
        assert_eq!(tracker.read(space, &[code], &mut bytes).unwrap(), []);
        bytes
    };
    let before = read();
    target.write(code, 7);
    let (kept, later) = (2 * PAGE as usize, 4 * PAGE as usize);
    let after = read();
    assert_eq!(after[..kept], before[..kept]);
    assert_ne!(after[kept..later], before[kept..later], "these are read when asked for");
    tracker.round().unwrap();
    assert_ne!(read()[..kept], before[..kept], "and all of them in a round");
}

#[test]
fn shared_memory_is_somebody_elses() {
    let mut target = Target::start();
    let memory = target.map("shared", 16);
    let tracker = target.tracker();
    assert_eq!(written(&tracker, &target, memory), 0);
    let last = tracker.last().unwrap();
    assert_eq!(last.present[0].1.within(memory).count(), 0);
}

#[test]
fn memory_that_is_new_or_has_moved_is_named_whole() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 32);
    let tracker = target.tracker();
    tracker.round().unwrap();
    let new = target.map("anonymous", 16);
    let moved = PageRange::of_pages(target.to("remap", memory, 48), 32).unwrap();
    let dirty = tracker.round().unwrap();
    assert_eq!(named(&dirty, target.pid(), new), 16);
    assert_eq!(named(&dirty, target.pid(), moved), 32);
    // Grown behind what was watched, and written there.
    target.write(PageRange::of_pages(moved.end(), 16).unwrap(), 5);
    let dirty = tracker.round().unwrap();
    assert_eq!(named(&dirty, target.pid(), PageRange::of_pages(moved.end(), 16).unwrap()), 16);
    assert_eq!(named(&dirty, target.pid(), moved), 0);
    assert_eq!(named(&dirty, target.pid(), new), 0);
}

#[test]
fn memory_that_is_replaced_at_its_address_is_named_whole() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 64);
    let tracker = target.tracker();
    tracker.round().unwrap();
    // The kernel gives the gap away again, and part of what is watched is
    // written before the scan meets the part that is not.
    let middle = PageRange::of_pages(memory.start() + 16 * PAGE, 16).unwrap();
    target.to("unmap", middle, 0);
    let again = target.map("anonymous", 16);
    target.write(page(memory, 1), 9);
    target.write(page(memory, 60), 9);
    let dirty = tracker.round().unwrap();
    assert_eq!(named(&dirty, target.pid(), again), 16);
    for index in [1, 60] {
        assert_eq!(named(&dirty, target.pid(), page(memory, index)), 1);
    }
}

#[test]
fn memory_that_was_given_back_is_not_present() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 64);
    let tracker = target.tracker();
    let mut store = Store::default();
    store.take(&tracker, &tracker.round().unwrap());
    let part = PageRange::of_pages(memory.start(), 8).unwrap();
    target.to("advise", part, libc::MADV_DONTNEED as u64);
    target.to("advise", page(memory, 20), libc::MADV_FREE as u64);
    target.to("advise", page(memory, 21), libc::MADV_DONTNEED as u64);
    target.write(page(memory, 21), 3);
    target.to("look", part, 0);
    target.halt();
    store.check(&tracker);
    let last = tracker.last().unwrap();
    assert_eq!(last.present[0].1.within(part).count(), 0, "read as the page of zeroes");
    assert_eq!(named(&last.dirty, target.pid(), page(memory, 21)), 1);
}

#[test]
fn a_file_shows_again_where_its_changes_were_given_back() {
    let mut target = Target::start();
    let memory = target.map("file", 64);
    let tracker = target.tracker();
    let mut store = Store::default();
    for _ in 0..2 {
        store.take(&tracker, &tracker.round().unwrap());
    }
    let part = PageRange::of_pages(memory.start(), 8).unwrap();
    target.to("advise", part, libc::MADV_DONTNEED as u64);
    target.halt();
    store.check(&tracker);
}

#[test]
fn protection_hides_nothing() {
    let mut target = Target::start();
    let (hidden, readable) = (target.map("anonymous", 16), target.map("anonymous", 16));
    target.to("protect", hidden, libc::PROT_NONE as u64);
    target.to("protect", readable, libc::PROT_READ as u64);
    let tracker = target.tracker();
    let dirty = tracker.round().unwrap();
    assert_eq!(named(&dirty, target.pid(), hidden), 16);
    assert_eq!(named(&dirty, target.pid(), readable), 16);
    let mut bytes = vec![0; 33 * PAGE as usize];
    let gap = PageRange::of_pages(PAGE, 1).unwrap();
    let gone = tracker.read(target.space(), &[readable, gap, hidden], &mut bytes).unwrap();
    assert_eq!(gone, [gap]);
    let word = |page: usize| u64::from_ne_bytes(bytes[page * 4096 + 8..][..8].try_into().unwrap());
    assert_eq!((word(3), word(16), word(17 + 3)), (4, 0, 4));
    // Written after all.
    target.to("protect", readable, (libc::PROT_READ | libc::PROT_WRITE) as u64);
    target.write(page(readable, 2), 9);
    assert_eq!(written(&tracker, &target, readable), 1);
}

#[test]
fn a_stack_that_grows_is_watched() {
    let mut target = Target::start();
    let tracker = target.tracker();
    let mut store = Store::default();
    store.take(&tracker, &tracker.round().unwrap());
    assert_eq!(target.ask("stack 64"), 0);
    assert!(tracker.peek().unwrap() >= 64);
    store.take(&tracker, &tracker.round().unwrap());
    target.halt();
    store.check(&tracker);
}

#[test]
fn a_child_is_found_and_lost_again() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 16);
    let tracker = target.tracker();
    tracker.round().unwrap();
    let child = target.to("fork", page(memory, 2), 9) as i32;
    until(|| sys::asleep(child));
    let dirty = tracker.round().unwrap();
    assert_eq!(named(&dirty, child, memory), 16, "nobody has watched it");
    assert_eq!(named(&dirty, target.pid(), memory), 0, "its parent wrote nothing");
    assert_eq!(tracker.spaces().len(), 2);
    assert_eq!(named(&tracker.round().unwrap(), child, memory), 0);
    sys::kill(child, libc::SIGKILL);
    until(|| session(target.pid()).len() == 1);
    tracker.round().unwrap();
    assert_eq!(tracker.spaces(), [(target.space(), target.pid())]);
    let mut bytes = vec![1; PAGE as usize];
    let first = page(memory, 0);
    assert_eq!(tracker.read(space(child), &[first], &mut bytes).unwrap(), [first]);
    assert_eq!(bytes, vec![0; PAGE as usize]);
}

#[test]
fn another_program_is_another_memory() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 16);
    let tracker = target.tracker();
    tracker.round().unwrap();
    target.ask("exec");
    let dirty = tracker.round().unwrap();
    assert_eq!(named(&dirty, target.pid(), memory), 0);
    assert!(dirty.pages() > 50, "all of the new program");
    assert_eq!(tracker.statistics().stops, 2);
    let again = target.map("anonymous", 16);
    assert_eq!(written(&tracker, &target, again), 16);
    target.write(page(again, 5), 6);
    assert_eq!(written(&tracker, &target, again), 1);
    target.halt();
    assert_eq!(tracker.last().unwrap().present.len(), 1);
}

#[test]
fn what_threads_write_during_a_scan_is_not_lost() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 64);
    target.ask(&format!("threads {} 64", memory.start()));
    let tracker = target.tracker();
    let mut store = Store::default();
    for _ in 0..30 {
        store.take(&tracker, &tracker.round().unwrap());
    }
    assert_eq!(tracker.statistics().unwatched, []);
    target.halt();
    store.check(&tracker);
}

#[test]
fn with_no_backend_all_comes_last() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 16);
    let tracker = tracker(target.pid(), Want::Only(Backend::None));
    assert_eq!(tracker.round().unwrap().pages(), 0);
    target.halt();
    let last = tracker.last().unwrap();
    assert_eq!(named(&last.dirty, target.pid(), memory), 16);
    Store::default().check(&tracker);
    assert_eq!(tracker.statistics().stops, 0);
}

#[test]
fn a_backend_that_the_kernel_lacks_is_refused_with_the_reason() {
    let soft_dirty = Tracker::new(Box::new(|| Ok(vec![])), Want::Only(Backend::SoftDirty));
    match soft_dirty {
        Err(error) => assert!(error.to_string().contains("no soft-dirty bit"), "{error}"),
        Ok(_) => eprintln!("NOT TESTED: this kernel has soft-dirty"),
    }
}
