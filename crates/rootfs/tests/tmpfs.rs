//! A tmpfs is held, read and made again, with the kernel's own mounts.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;
use transship_rootfs::tmpfs::{Held, Plan, Tmpfs, Why, make, plan};

/// A directory whose mounts nobody else gets.
struct Place(TempDir);

impl Place {
    fn new() -> Option<Self> {
        let place = Self(tempfile::tempdir().unwrap());
        if let Err(reason) = place.mount(&["-t", "tmpfs", "--make-private", "tmpfs"], "") {
            eprintln!("SKIPPED: mounts are not possible here: {reason}");
            return None;
        }
        Some(place)
    }

    fn path(&self, below: &str) -> PathBuf {
        self.0.path().join(below)
    }

    fn mount(&self, how: &[&str], below: &str) -> Result<(), String> {
        let at = self.path(below);
        fs::create_dir_all(&at).unwrap();
        let done = Command::new("mount").args(how).arg(at).output().unwrap();
        match done.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&done.stderr).into_owned()),
        }
    }

    /// The mounts below it. None of the machine's others is of interest.
    fn plan(&self) -> Plan {
        let all = plan(&table(), &HashSet::new());
        let below = |point: &Path| point.starts_with(self.0.path()) && point != self.0.path();
        Plan {
            ours: all.ours.into_iter().filter(|one| below(Path::new(one.point()))).collect(),
            left: all.left.into_iter().filter(|one| below(&one.point)).collect(),
        }
    }

    fn planned(&self, below: &str) -> Tmpfs {
        let path = self.path(below);
        let found = self.plan().ours.into_iter().find(|one| Path::new(one.point()) == path);
        found.expect("a tmpfs of ours")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-R").arg(self.0.path()).status();
    }
}

fn table() -> Vec<u8> {
    fs::read("/proc/self/mountinfo").unwrap()
}

fn contents(held: &Held) -> Vec<u8> {
    let mut stream = Vec::new();
    held.send(&mut |bytes| {
        stream.extend(bytes);
        Ok(())
    })
    .unwrap();
    stream
}

#[test]
fn one_is_made_like_another() {
    let Some(place) = Place::new() else { return };
    let options = "nosuid,size=2m,nr_inodes=100,mode=1750,uid=5,gid=6";
    place.mount(&["-t", "tmpfs", "-o", options, "shm"], "from").unwrap();
    let from = place.path("from");
    fs::create_dir_all(from.join("below/hidden")).unwrap();
    fs::write(from.join("below/file"), "contents").unwrap();
    fs::set_permissions(from.join("below/file"), fs::Permissions::from_mode(0o4711)).unwrap();
    symlink("below/file", from.join("link")).unwrap();
    let held = place.planned("from").hold().unwrap();
    // What is mounted on it hides nothing, and does not go along.
    place.mount(&["-t", "tmpfs", "other"], "from/below").unwrap();
    fs::write(from.join("below/not-ours"), "").unwrap();

    let stream = contents(&held);
    let to = place.path("to");
    fs::create_dir(&to).unwrap();
    let mount = held.mount();
    make(&mount.source, &mount.options, &to, &mut stream.as_slice()).unwrap();
    assert_eq!(fs::read_to_string(to.join("link")).unwrap(), "contents");
    assert_eq!(fs::metadata(to.join("below/file")).unwrap().mode() & 0o7777, 0o4711);
    assert!(to.join("below/hidden").is_dir());
    assert!(!to.join("below/not-ours").exists());
    let root = fs::metadata(&to).unwrap();
    assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o1750, 5, 6));
    let made = place.planned("to");
    assert_eq!((&made.source, &made.options), (&mount.source, &mount.options));
    assert!(fs::write(to.join("large"), vec![0; 3 << 20]).is_err(), "its size is limited");
}

#[test]
fn what_cannot_be_written_is_filled_all_the_same() {
    let Some(place) = Place::new() else { return };
    place.mount(&["-t", "tmpfs", "-o", "mode=700", "tmpfs"], "from").unwrap();
    fs::write(place.path("from/file"), "contents").unwrap();
    place.mount(&["-o", "remount,ro"], "from").unwrap();
    let held = place.planned("from").hold().unwrap();
    fs::create_dir(place.path("to")).unwrap();
    let mount = held.mount();
    make(&mount.source, &mount.options, &place.path("to"), &mut contents(&held).as_slice())
        .unwrap();
    assert_eq!(fs::read_to_string(place.path("to/file")).unwrap(), "contents");
    assert_eq!(fs::write(place.path("to/file"), "").unwrap_err().raw_os_error(), Some(30));
}

#[test]
fn what_lies_under_another_mount_is_not_taken_for_it() {
    let Some(place) = Place::new() else { return };
    place.mount(&["-t", "tmpfs", "tmpfs"], "above/from").unwrap();
    let planned = place.planned("above/from");
    assert!(!planned.is_replaced(&table()));
    place.mount(&["-t", "tmpfs", "tmpfs"], "above").unwrap();
    let left = planned.clone().hold().unwrap_err();
    assert!(matches!(left.why, Why::Hidden(_)), "{left}");
    fs::create_dir(place.path("above/from")).unwrap();
    let left = planned.hold().unwrap_err();
    assert!(matches!(left.why, Why::Hidden(_)), "{left}");
}

#[test]
fn half_a_stream_mounts_nothing() {
    let Some(place) = Place::new() else { return };
    place.mount(&["-t", "tmpfs", "tmpfs"], "from").unwrap();
    fs::write(place.path("from/file"), "contents").unwrap();
    let held = place.planned("from").hold().unwrap();
    let stream = contents(&held);
    fs::create_dir(place.path("to")).unwrap();
    let mount = held.mount();
    for length in [0, 1, stream.len() / 2, stream.len() - 1] {
        let half = &mut &stream[..length];
        make(&mount.source, &mount.options, &place.path("to"), half).unwrap_err();
    }
    assert_eq!(place.plan().ours.len(), 1);
}
