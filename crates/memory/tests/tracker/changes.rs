//! What a program does to its memory is noticed, and nothing else is.

use transship_memory::{Backend, Dirty, Memory};
use transship_types::{PAGE, PageRange};

use crate::{
    store::Store,
    target::{Target, space},
};

fn page(range: PageRange, index: u64) -> PageRange {
    PageRange::of_pages(range.start() + index * PAGE, 1).unwrap()
}

/// How many pages of the range are named.
fn named(dirty: &Dirty, pid: i32, range: PageRange) -> u64 {
    let spaces = dirty.spaces.iter().filter(|(named, _)| *named == space(pid));
    spaces.flat_map(|(_, pages)| pages.within(range)).map(PageRange::pages).sum()
}

#[test]
fn what_is_written_is_named_once() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 64);
    let tracker = target.tracker();
    assert_eq!(tracker.backend(), Backend::WriteProtect);
    assert_eq!(named(&tracker.round().unwrap(), target.pid(), memory), 64, "all at first");
    assert_eq!(named(&tracker.round().unwrap(), target.pid(), memory), 0);
    target.write(page(memory, 3), 7);
    target.ask(&format!("look {} 64", memory.start()));
    assert!(tracker.peek().unwrap() > 0);
    assert_eq!(named(&tracker.last().unwrap().dirty, target.pid(), memory), 1);
    let dirty = tracker.round().unwrap();
    assert_eq!(named(&dirty, target.pid(), page(memory, 3)), 1, "neither of them reset it");
    assert_eq!(named(&dirty, target.pid(), memory), 1);
    assert_eq!(named(&tracker.round().unwrap(), target.pid(), memory), 0);
    target.halt();
    Store::default().check(&target.tracker());
}
