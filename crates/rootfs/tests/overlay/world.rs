//! Two nodes' worth of overlay mounts with equal images, and what a process
//! inside would see of each.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;
use transship_rootfs::{Index, Layer, Receiver, Totals, send, send_frozen};

/// Overlays need privileges and a file system that can carry an upper
/// directory. Where they are missing the tests say so and do nothing.
pub fn possible() -> bool {
    let world = World::try_new("", |_| {});
    if let Err(reason) = &world {
        eprintln!("SKIPPED: overlay mounts are not possible here: {reason}");
    }
    world.is_ok()
}

pub struct World {
    pub source: Overlay,
    pub target: Overlay,
    index: Option<Index>,
    _place: TempDir,
}

pub struct Overlay {
    pub merged: PathBuf,
    pub upper: PathBuf,
}

impl Overlay {
    fn mount(place: &Path, name: &str, lower: &Path, options: &str) -> Result<Self, String> {
        let directory = |part: &str| {
            let path = place.join(name).join(part);
            fs::create_dir_all(&path).map(|()| path).map_err(|e| e.to_string())
        };
        let (merged, upper, work) = (directory("merged")?, directory("upper")?, directory("work")?);
        let all = format!(
            "lowerdir={},upperdir={},workdir={}{options}",
            lower.display(),
            upper.display(),
            work.display()
        );
        let mount = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &all])
            .arg(&merged)
            .output()
            .map_err(|e| format!("mount: {e}"))?;
        if !mount.status.success() {
            return Err(String::from_utf8_lossy(&mount.stderr).into_owned());
        }
        Ok(Self { merged, upper })
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(&self.merged).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "umount {:?}", self.merged);
    }
}

impl World {
    /// `fill` writes the image that both sides have. `options` are the
    /// source's further mount options, each with a comma before it.
    pub fn try_new(options: &str, fill: impl FnOnce(&Path)) -> Result<Self, String> {
        let place = tempfile::Builder::new().prefix("ts-rootfs-").tempdir().expect("a place");
        let lower = place.path().join("lower");
        fs::create_dir(&lower).expect("the image");
        fill(&lower);
        let source = Overlay::mount(place.path(), "source", &lower, options)?;
        let target = Overlay::mount(place.path(), "target", &lower, "")?;
        Ok(Self { source, target, index: None, _place: place })
    }

    pub fn new(fill: impl FnOnce(&Path)) -> Self {
        Self::try_new("", fill).expect("overlay mounts")
    }

    pub fn layer(&self) -> Layer {
        let layer = Layer::of_mount(&self.source.merged).unwrap().expect("an overlay");
        assert_eq!(layer.upper, self.source.upper.canonicalize().unwrap());
        layer
    }

    /// A pass while the container runs.
    pub fn pass(&mut self) -> Totals {
        self.send(false)
    }

    /// The pass over the frozen container.
    pub fn last(&mut self) -> Totals {
        self.send(true)
    }

    fn send(&mut self, frozen: bool) -> Totals {
        let mut receiver = Receiver::new(&self.target.merged).unwrap();
        let mut sink = |bytes: &[u8]| receiver.feed(bytes).map_err(std::io::Error::other);
        let way = if frozen { send_frozen } else { send };
        let (index, totals) = way(&self.layer(), self.index.as_ref(), &mut sink).unwrap();
        assert_eq!(receiver.finish().unwrap(), totals);
        self.index = Some(index);
        totals
    }

    /// What the first difference is, if there is any.
    pub fn difference(&self) -> Option<String> {
        let (source, target) = (tree(&self.source.merged), tree(&self.target.merged));
        for (path, here) in &source {
            match target.get(path) {
                None => return Some(format!("{path:?} is missing: {here:?}")),
                Some(there) if there != here && !self.image_link(path, here, there) => {
                    return Some(format!("{path:?}:\n source {here:?}\n target {there:?}"));
                }
                Some(_) => {}
            }
        }
        let extra = target.keys().find(|path| !source.contains_key(*path) && !self.forgotten(path));
        extra.map(|path| format!("{path:?} should not be there"))
    }

    /// A file of the image with several names, one of them in a redirected
    /// directory: that directory is sent whole, so the file becomes the
    /// layer's own on the target. On the source the first write to it would
    /// part the names as well (`index=off`).
    fn image_link(&self, path: &Path, here: &Looks, there: &Looks) -> bool {
        let of_image = self.source.upper.join(path).symlink_metadata().is_err();
        of_image
            && Looks { first_name: None, ..here.clone() }
                == Looks { first_name: None, ..there.clone() }
    }

    /// With redirected directories the kernel sometimes forgets to leave a
    /// whiteout: it lists a name of the image again that it still says is not
    /// there, until its cache lets go. Either answer is right for such a name.
    fn forgotten(&self, path: &Path) -> bool {
        path.ancestors().any(|path| {
            let full = self.source.merged.join(path);
            let (Some(parent), Some(name)) = (full.parent(), full.file_name()) else {
                return false;
            };
            full.symlink_metadata().is_err()
                && fs::read_dir(parent)
                    .is_ok_and(|list| list.flatten().any(|e| e.file_name() == name))
        })
    }

    pub fn assert_same(&self) {
        assert_eq!(self.difference(), None);
    }
}

/// Everything a process can see of an entry, but for access and change times
/// and inode numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Looks {
    mode: u32,
    owner: (u32, u32),
    device: u64,
    modified: (i64, i64),
    attributes: BTreeMap<OsString, Vec<u8>>,
    content: Vec<u8>,
    /// Blocks of zeros at the places where the file has holes read the same;
    /// so the bytes on disk, in steps large enough for any block size.
    stored: u64,
    /// The first name of the same file.
    first_name: Option<PathBuf>,
}

pub fn tree(root: &Path) -> BTreeMap<PathBuf, Looks> {
    let mut paths = vec![PathBuf::new()];
    let mut found = Vec::new();
    while let Some(path) = paths.pop() {
        let full = root.join(&path);
        // See `forgotten`.
        let Ok(status) = full.symlink_metadata() else { continue };
        if status.is_dir() {
            for entry in fs::read_dir(&full).unwrap() {
                paths.push(path.join(entry.unwrap().file_name()));
            }
        }
        found.push(path);
    }
    found.sort();
    let mut first_names = BTreeMap::new();
    let mut tree = BTreeMap::new();
    for path in found {
        let full = root.join(&path);
        let status = full.symlink_metadata().unwrap();
        let kind = status.file_type();
        let first_name = (!kind.is_dir() && status.nlink() > 1).then(|| {
            let object = (status.dev(), status.ino());
            first_names.entry(object).or_insert_with(|| path.clone()).clone()
        });
        let content = if kind.is_file() {
            fs::read(&full).unwrap()
        } else if kind.is_symlink() {
            fs::read_link(&full).unwrap().into_os_string().into_encoded_bytes()
        } else {
            Vec::new()
        };
        let looks = Looks {
            mode: status.mode(),
            owner: (status.uid(), status.gid()),
            device: status.rdev(),
            modified: (status.mtime(), status.mtime_nsec()),
            attributes: attributes(&full),
            stored: if kind.is_file() && content.len() > 1 << 20 {
                (status.blocks() * 512) >> 20
            } else {
                0
            },
            content,
            first_name,
        };
        tree.insert(path, looks);
    }
    // Links that lead out of the tree do not count: only one name is here.
    let mut names = BTreeMap::new();
    for looks in tree.values() {
        *names.entry(looks.first_name.clone()).or_insert(0) += 1;
    }
    for looks in tree.values_mut() {
        if names[&looks.first_name] == 1 {
            looks.first_name = None;
        }
    }
    tree
}

fn attributes(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    use std::os::unix::ffi::OsStringExt;
    let mut list = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, list.as_mut_slice()).unwrap_or(0);
    list[..length]
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 65536];
            let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
            value.truncate(length);
            (OsString::from_vec(name.to_vec()), value)
        })
        .collect()
}
