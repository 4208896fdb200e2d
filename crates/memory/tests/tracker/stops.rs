//! A process is stopped for a moment, whatever it is doing, and goes on as if
//! nothing had been.

use transship_memory::{Memory, obstacles};
use transship_types::PAGE;

use crate::{
    store::Store,
    sys,
    target::{Target, descriptors, threads, until, watched_mappings},
};

#[test]
fn nothing_is_left_behind() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 64);
    let before = descriptors(target.pid());
    for drop_it in [false, true] {
        let tracker = target.tracker();
        tracker.round().unwrap();
        assert_eq!(descriptors(target.pid()), before);
        assert!(watched_mappings(target.pid()) > 0);
        assert!(!threads(target.pid()).iter().any(|state| b"Tt".contains(state)));
        if drop_it {
            drop(tracker);
        } else {
            tracker.disarm();
            assert!(tracker.round().is_err());
        }
        assert_eq!(watched_mappings(target.pid()), 0);
    }
    target.write(memory, 5);
    assert_eq!(descriptors(target.pid()), before);
}

#[test]
fn a_system_call_that_waits_goes_on_waiting() {
    let mut target = Target::start();
    target.tell("sleep 600");
    until(|| sys::asleep(target.pid()));
    for _ in 0..10 {
        target.tracker().round().unwrap();
    }
    let slept = target.answer();
    assert!((600..5_000).contains(&slept), "{slept} ms");
}

#[test]
fn no_signal_is_lost() {
    let mut target = Target::start();
    target.ask("count");
    let pid = target.pid();
    let sent = std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            (0..20_000).filter(|_| sys::queue(pid, libc::SIGRTMIN() + 1).is_ok()).count()
        });
        let mut armed = 0;
        while !flood.is_finished() || armed < 20 {
            let tracker = target.tracker();
            tracker.round().unwrap();
            armed += tracker.statistics().stops;
        }
        flood.join().unwrap()
    });
    until(|| target.ask("counted") == sent as u64);
}

#[test]
fn a_stopped_process_stays_stopped() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 16);
    target.halt();
    let tracker = target.tracker();
    assert!(tracker.round().unwrap().pages() > 16);
    assert_eq!(tracker.statistics().unwatched, []);
    assert_eq!(tracker.statistics().stops, 1);
    until(|| threads(target.pid()).iter().all(|state| *state == b'T'));
    target.go_on();
    target.write(memory, 4);
    assert!(tracker.round().unwrap().pages() >= 16);
}

#[test]
fn a_filter_that_kills_does_not() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 16);
    target.ask("forbid");
    let tracker = target.tracker();
    tracker.round().unwrap();
    assert_eq!(tracker.statistics().unwatched, []);
    target.write(memory, 4);
    assert!(tracker.round().unwrap().pages() >= 16);
    drop(tracker);
    // It is in force again.
    target.tell(&format!("uffd {} 1", memory.start()));
    until(|| threads(target.pid()).is_empty());
}

#[test]
fn the_parent_of_a_vfork_is_watched_later() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 16);
    let tracker = target.tracker();
    target.tell("vfork");
    until(|| threads(target.pid()) == [b'D']);
    for _ in 0..2 {
        let dirty = tracker.round().unwrap();
        assert_eq!(dirty.spaces.len(), 1, "parent and child share their memory");
        assert!(dirty.pages() > 16, "all of it, each time");
        assert_eq!(tracker.spaces(), [(target.space(), target.pid())]);
        assert_eq!(tracker.statistics().unwatched.len(), 1);
    }
    // A byte is what the child waits for.
    target.ask("");
    tracker.round().unwrap();
    assert_eq!(tracker.statistics().unwatched, []);
    target.write(memory, 3);
    let pages = tracker.round().unwrap().pages();
    assert!((16..100).contains(&pages), "{pages} pages");
}

#[test]
fn a_process_without_a_free_descriptor_is_named_whole() {
    let mut target = Target::start();
    let memory = target.map("anonymous", 16);
    target.ask("descriptors");
    let before = descriptors(target.pid());
    let tracker = target.tracker();
    let mut store = Store::default();
    for _ in 0..2 {
        let dirty = tracker.round().unwrap();
        assert!(dirty.pages() > 16);
        store.take(&tracker, &dirty);
    }
    let unwatched = tracker.statistics().unwatched;
    assert!(unwatched[0].1.contains("Too many open files"), "{unwatched:?}");
    assert_eq!(descriptors(target.pid()), before);
    target.write(memory, 3);
    target.halt();
    store.check(&tracker);
}

#[test]
fn memory_that_the_process_itself_watches_is_named_always() {
    let mut target = Target::start();
    let (own, other) = (target.map("anonymous", 16), target.map("anonymous", 16));
    assert_eq!(obstacles(target.pid()), [] as [String; 0]);
    target.to("uffd", own, 0);
    let told = obstacles(target.pid());
    assert!(told.len() == 1 && told[0].contains("userfaultfd"), "{told:?}");
    let tracker = target.tracker();
    tracker.round().unwrap();
    for _ in 0..2 {
        let dirty = tracker.round().unwrap();
        let pages = |range| dirty.spaces[0].1.within(range).map(|part| part.pages()).sum::<u64>();
        assert_eq!((pages(own), pages(other)), (16, 0));
    }
    target.halt();
    let last = tracker.last().unwrap();
    assert_eq!(last.dirty.spaces[0].1.within(own).count(), 1);
    tracker.disarm();
    assert!(watched_mappings(target.pid()) <= 1, "only its own");
    assert_eq!(own.bytes(), 16 * PAGE);
}
