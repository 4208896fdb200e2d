//! Memory that several processes share.

use std::sync::Arc;

use transship_memory::{ContainerMemory, Dirty, Memory, SharedObjects};
use transship_types::{PAGE, PageSet, Space};

use crate::target::{Target, session};

fn objects(target: &Target) -> SharedObjects {
    let pid = target.pid();
    SharedObjects::new(Box::new(move || Ok(session(pid)))).unwrap()
}

/// Reads all that is dirty, as a round does.
fn take(objects: &SharedObjects, dirty: &Dirty) {
    for (space, pages) in &dirty.spaces {
        let Space::Shared(object) = *space else { panic!("{space} is not shared") };
        for range in pages.iter() {
            let mut bytes = vec![0; range.bytes() as usize];
            assert_eq!(objects.read(object, &[range], &mut bytes).unwrap(), []);
        }
    }
}

#[test]
fn shared_memory_is_found_and_its_changes_are_named() {
    let mut target = Target::start();
    let memory = target.map("shared", 64);
    let private = target.map("anonymous", 16);
    let objects = objects(&target);
    let dirty = objects.round().unwrap();
    let [(Space::Shared(object), pages)] = &dirty.spaces[..] else { panic!("{dirty:?}") };
    assert_eq!(pages.pages(), 64);
    take(&objects, &dirty);

    target.write(private, 2);
    assert_eq!(objects.round().unwrap().pages(), 0);
    let (third, _) = memory.split(4).1.unwrap().split(2);
    target.write(third, 2);
    let (dirty, present) = objects.last().unwrap();
    let offset = third.start() - memory.start();
    let named: Vec<_> = dirty.spaces[0].1.iter().map(|r| (r.start(), r.pages())).collect();
    assert_eq!(named, [(offset, 2)]);
    let there: u64 = present.iter().map(|(_, pages): &(_, PageSet)| pages.pages()).sum();
    assert_eq!(there, 64);

    // What it holds is what the process sees.
    let mut bytes = vec![0; 2 * PAGE as usize];
    let range = dirty.spaces[0].1.iter().next().unwrap();
    objects.read(*object, &[range], &mut bytes).unwrap();
    let mut seen = vec![0; bytes.len()];
    let mem = std::fs::File::open(format!("/proc/{}/mem", target.pid())).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&mem, &mut seen, third.start()).unwrap();
    assert!(bytes == seen);

    // Nobody has it mapped any more.
    target.to("unmap", memory, 0);
    assert_eq!(objects.round().unwrap().spaces, []);
    assert_eq!(objects.read(*object, &[range], &mut bytes).unwrap(), [range]);
    assert!(bytes.iter().all(|byte| *byte == 0));
}

#[test]
fn a_container_has_both_kinds_of_memory() {
    let mut target = Target::start();
    let shared = target.map("shared", 8);
    let private = target.map("anonymous", 16);
    let memory = ContainerMemory::new(Arc::new(target.tracker()), objects(&target));
    let take = |dirty: &Dirty| {
        for (space, pages) in &dirty.spaces {
            for range in pages.iter() {
                let mut bytes = vec![0; range.bytes() as usize];
                memory.read(*space, &[range], &mut bytes).unwrap();
            }
        }
    };
    take(&memory.round().unwrap());
    target.write(shared.split(3).0, 2);
    target.write(private.split(5).0, 2);
    assert!(memory.peek().unwrap() >= 8);
    let of = |dirty: &Dirty, which: fn(&Space) -> bool| -> u64 {
        let ours = dirty.spaces.iter().filter(|(space, _)| which(space));
        ours.map(|(_, pages)| pages.pages()).sum()
    };
    target.halt();
    let last = memory.last().unwrap();
    assert_eq!(of(&last.dirty, |space| matches!(space, Space::Shared(_))), 3);
    assert!(of(&last.dirty, |space| matches!(space, Space::Process(_))) >= 5);
    assert!(last.present.iter().any(|(space, _)| *space == target.space()));
    assert!(last.present.iter().any(|(space, _)| matches!(space, Space::Shared(_))));
    memory.disarm();
}
