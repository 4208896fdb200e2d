//! The writable layer over real overlay mounts: after any life and any number
//! of passes the target's tree is the source's.
//!
//! Root is needed, and said aloud when missing.

mod random;
mod sys;
mod world;

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt, symlink},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use random::{Dice, step};
use sys::Mapping;
use transship_rootfs::{Layer, Receiver, RootfsError, Totals, send, send_frozen, sync};
use world::{World, possible, tree};

fn image(root: &Path) {
    fs::create_dir_all(root.join("etc/conf.d")).unwrap();
    fs::create_dir_all(root.join("a/b/c")).unwrap();
    fs::create_dir_all(root.join("d")).unwrap();
    for file in ["etc/passwd", "etc/conf.d/x", "a/a", "a/b/a", "a/b/c/a", "d/a", "d/b", "b"] {
        fs::write(root.join(file), format!("of the image: {file}")).unwrap();
    }
    fs::hard_link(root.join("a/a"), root.join("a/linked")).unwrap();
    symlink("../etc", root.join("a/link")).unwrap();
}

/// The kernel's options that change what an upper directory looks like.
const VARIANTS: [&str; 4] =
    ["", ",redirect_dir=on", ",metacopy=on,redirect_dir=on", ",index=on,xino=off"];

#[test]
fn any_life_in_any_passes_gives_the_same_tree() {
    if !possible() {
        return;
    }
    let seeds: u64 =
        std::env::var("TRANSSHIP_ROOTFS_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(48);
    for seed in 0..seeds {
        let options = VARIANTS[(seed % 4) as usize];
        let mut dice = Dice::new(seed + 1);
        let filled = |root: &Path| {
            image(root);
            let mut dice = Dice::new(seed + 1000);
            (0..60).for_each(|_| step(root, &mut dice));
        };
        let mut world = match World::try_new(options, filled) {
            Ok(world) => world,
            Err(reason) => {
                eprintln!("SKIPPED: mount option {options:?} is not possible here: {reason}");
                continue;
            }
        };
        for _ in 0..dice.below(4) {
            for _ in 0..dice.below(80) {
                step(&world.source.merged, &mut dice);
            }
            world.pass();
        }
        for _ in 0..dice.below(40) {
            step(&world.source.merged, &mut dice);
        }
        world.last();
        assert_eq!(world.difference(), None, "seed {seed}, options {options:?}");
    }
}

#[test]
fn what_has_not_changed_is_not_sent_again() {
    if !possible() {
        return;
    }
    let mut world = World::new(image);
    let inside = world.source.merged.clone();
    for number in 0..20 {
        fs::write(inside.join(format!("file-{number}")), vec![1; 10_000]).unwrap();
    }
    fs::remove_file(inside.join("b")).unwrap();
    assert_eq!(world.pass(), Totals { entries: 21, bytes: 200_000 });
    settle(&inside.join("file-19"));
    // Some were too young to be trusted; now they are not.
    world.pass();
    assert_eq!(world.pass(), Totals::default());
    fs::write(inside.join("file-7"), "short").unwrap();
    assert_eq!(world.last(), Totals { entries: 1, bytes: 5 });
    world.assert_same();
}

/// Waits until a ctime is older than the clock's coarsest tick.
fn settle(path: &Path) {
    let margin = std::time::Duration::from_millis(25);
    while fs::metadata(path).unwrap().modified().unwrap().elapsed().unwrap_or_default() < margin {
        std::thread::yield_now();
    }
}

#[test]
fn removals_reach_the_image_and_what_was_sent_before() {
    if !possible() {
        return;
    }
    let mut world = World::new(image);
    let inside = world.source.merged.clone();
    fs::create_dir_all(inside.join("new/deep/er")).unwrap();
    fs::write(inside.join("new/deep/file"), "x").unwrap();
    world.pass();
    fs::remove_dir_all(inside.join("new")).unwrap();
    fs::remove_dir_all(inside.join("a")).unwrap();
    fs::remove_file(inside.join("etc/passwd")).unwrap();
    world.pass();
    assert!(!world.target.merged.join("new").exists());
    // And back, hiding what the image had.
    fs::create_dir_all(inside.join("a/b")).unwrap();
    fs::write(inside.join("etc/passwd"), "mine").unwrap();
    world.last();
    world.assert_same();
    assert_eq!(fs::read_dir(world.target.merged.join("a/b")).unwrap().count(), 0);
}

#[test]
fn renamed_directories_of_the_image_move_whole() {
    if !possible() {
        return;
    }
    let Ok(mut world) = World::try_new(",redirect_dir=on", image) else {
        return eprintln!("SKIPPED: redirect_dir=on is not possible here");
    };
    let inside = world.source.merged.clone();
    fs::rename(inside.join("a"), inside.join("moved")).unwrap();
    fs::write(inside.join("moved/b/fresh"), "x").unwrap();
    fs::remove_file(inside.join("moved/b/c/a")).unwrap();
    let upper = world.source.upper.join("moved");
    let mut buffer = [0; 64];
    assert!(
        rustix::fs::getxattr(&upper, "trusted.overlay.redirect", &mut buffer[..]).is_ok(),
        "the kernel copied instead of redirecting: this test shows nothing"
    );
    world.pass();
    world.assert_same();
    fs::rename(inside.join("moved"), inside.join("etc/moved")).unwrap();
    fs::write(inside.join("etc/moved/b/a"), "changed").unwrap();
    fs::create_dir(inside.join("moved")).unwrap();
    world.last();
    world.assert_same();
}

#[test]
fn metadata_only_copies_are_sent_with_their_content() {
    if !possible() {
        return;
    }
    let Ok(mut world) = World::try_new(",metacopy=on", image) else {
        return eprintln!("SKIPPED: metacopy=on is not possible here");
    };
    std::os::unix::fs::chown(world.source.merged.join("d/a"), Some(7), Some(8)).unwrap();
    world.last();
    world.assert_same();
    let content = fs::read(world.target.merged.join("d/a")).unwrap();
    assert_eq!(content, b"of the image: d/a");
}

#[test]
fn names_of_one_file_stay_names_of_one_file() {
    if !possible() {
        return;
    }
    let mut world = World::new(image);
    let inside = world.source.merged.clone();
    fs::write(inside.join("z"), "first").unwrap();
    fs::hard_link(inside.join("z"), inside.join("etc/y")).unwrap();
    world.pass();
    settle(&inside.join("z"));
    world.pass();
    fs::hard_link(inside.join("z"), inside.join("d/x")).unwrap();
    fs::write(inside.join("etc/y"), "second").unwrap();
    world.pass();
    world.assert_same();
    fs::remove_file(inside.join("z")).unwrap();
    world.last();
    world.assert_same();
    let inode = |path: &str| fs::metadata(world.target.merged.join(path)).unwrap().ino();
    assert_eq!(inode("etc/y"), inode("d/x"));
}

#[test]
fn a_mark_that_the_container_made_itself_hides_nothing() {
    if !possible() {
        return;
    }
    let mut world = World::new(image);
    let directory = world.source.merged.join("etc");
    let set = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(&directory, "user.overlay.opaque", b"y", set).unwrap();
    world.last();
    world.assert_same();
    assert!(world.target.merged.join("etc/passwd").exists());
}

#[test]
fn stores_through_a_shared_mapping_are_seen() {
    if !possible() {
        return;
    }
    let mut world = World::new(image);
    let path = world.source.merged.join("mapped");
    fs::write(&path, vec![0; 8192]).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mapping = Mapping::of(&file, 8192);
    mapping.store(0, 1);
    settle(&path);
    world.pass();
    settle(&path);
    mapping.store(1, 2);
    settle(&path);
    world.pass();
    // No new page: a first store to one would be seen in any case.
    mapping.store(2, 3);
    world.last();
    world.assert_same();
    assert_eq!(fs::read(world.target.merged.join("mapped")).unwrap()[..3], [1, 2, 3]);
}

#[test]
fn changes_under_way_are_no_error_until_the_container_is_frozen() {
    if !possible() {
        return;
    }
    let mut world = World::new(image);
    let inside = world.source.merged.clone();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut dice = Dice::new(4711);
            while !done.load(Ordering::Relaxed) {
                step(&inside, &mut dice);
            }
        });
        for _ in 0..25 {
            world.pass();
        }
        done.store(true, Ordering::Relaxed);
    });
    world.last();
    world.assert_same();
}

#[test]
fn a_change_of_the_frozen_tree_is_an_error_that_names_it() {
    if !possible() {
        return;
    }
    let world = World::new(image);
    let path = world.source.merged.join("big");
    fs::write(&path, vec![1; 2 << 20]).unwrap();
    let mut chunks = 0;
    let mut sink = |_: &[u8]| {
        chunks += 1;
        if chunks == 2 {
            OpenOptions::new().write(true).open(&path)?.write_all_at(b"x", 0)?;
        }
        Ok(())
    };
    let error = send_frozen(&world.layer(), None, &mut sink).unwrap_err();
    assert!(matches!(&error, RootfsError::Changed(at) if at.ends_with("big")), "{error}");
    let mut chunks = 0;
    let mut sink = |_: &[u8]| {
        chunks += 1;
        if chunks == 2 {
            File::options().write(true).open(&path)?.set_len(10)?;
        }
        Ok(())
    };
    send(&world.layer(), None, &mut sink).unwrap();
}

#[test]
fn a_sink_that_fails_ends_the_pass() {
    if !possible() {
        return;
    }
    let world = World::new(image);
    let mut sink = |_: &[u8]| Err(std::io::Error::other("the link is gone"));
    assert!(matches!(send(&world.layer(), None, &mut sink), Err(RootfsError::Sink(_))));
}

#[test]
fn a_tree_without_layers_replaces_the_targets() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    image(source.path());
    image(target.path());
    fs::remove_dir_all(source.path().join("a")).unwrap();
    fs::write(target.path().join("d/only here"), "x").unwrap();
    let mut index = None;
    for round in 0..3 {
        fs::write(source.path().join("etc/passwd"), format!("round {round}")).unwrap();
        fs::create_dir(source.path().join(format!("etc/{round}"))).unwrap();
        let _ = fs::remove_dir_all(source.path().join("etc/0"));
        let mut receiver = Receiver::new(target.path()).unwrap();
        let mut sink = |bytes: &[u8]| receiver.feed(bytes).map_err(std::io::Error::other);
        let layer = Layer::whole(source.path());
        let sent = send(&layer, index.as_ref(), &mut sink);
        match sent {
            Ok((next, _)) => index = Some(next),
            // Owners can only be given away by root.
            Err(error) => panic!("{error}"),
        }
        receiver.finish().unwrap();
    }
    sync(target.path()).unwrap();
    assert_eq!(tree(source.path()), tree(target.path()));
}

#[test]
fn the_layer_is_measured() {
    if !possible() {
        return;
    }
    let world = World::new(image);
    fs::write(world.source.merged.join("big"), vec![1; 1 << 20]).unwrap();
    File::create(world.source.merged.join("hole")).unwrap().set_len(1 << 30).unwrap();
    sync(&world.source.merged).unwrap();
    let bytes = world.layer().bytes();
    assert!((1 << 20..2 << 20).contains(&bytes), "{bytes}");
}
