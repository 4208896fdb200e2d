//! The stream of a pass over the writable layer, applied as a target applies
//! it.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use tempfile::TempDir;
use transship_rootfs::{Layer, Receiver, send};

/// A directory to apply to, with ways out of it, and beside it what nobody may
/// touch.
struct World(TempDir);

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (root, beside) = (dir.path().join("root"), dir.path().join("beside"));
        fs::create_dir_all(root.join("d")).expect("a directory");
        fs::create_dir(&beside).expect("a directory");
        fs::write(beside.join("file"), "secret").expect("a file");
        fs::write(root.join("f"), "old").expect("a file");
        symlink("..", root.join("up")).expect("a link");
        symlink(&beside, root.join("away")).expect("a link");
        symlink("../beside/file", root.join("b")).expect("a link");
        Self(dir)
    }

    fn root(&self) -> std::path::PathBuf {
        self.0.path().join("root")
    }

    fn is_as_it_was(&self) {
        let names = |dir: &Path| {
            let names = fs::read_dir(dir).expect("a directory").flatten();
            let mut names: Vec<_> = names.map(|entry| entry.file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(self.0.path()), ["beside", "root"]);
        let beside = self.0.path().join("beside");
        assert_eq!(names(&beside), ["file"]);
        let meta = fs::metadata(beside.join("file")).expect("a file");
        assert_eq!((meta.len(), meta.nlink()), (6, 1), "a file outside was reached");
        assert_eq!(fs::read(beside.join("file")).expect("a file"), b"secret");
    }
}

/// The first byte says how many bytes arrive at a time.
pub fn stream(bytes: &[u8]) {
    let Some((&step, stream)) = bytes.split_first() else { return };
    let world = World::new();
    let mut receiver = Receiver::new(&world.root()).expect("a root");
    let fed = stream.chunks(usize::from(step).max(1)).try_for_each(|piece| receiver.feed(piece));
    if fed.is_ok() {
        // A stream may end too early; then that is what it says.
        let _ = receiver.finish();
    } else {
        assert!(receiver.feed(b"x").is_err(), "it goes on after an error");
    }
    world.is_as_it_was();
}

pub fn stream_seeds() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("d/deeper")).expect("a directory");
    fs::write(at("d/text"), vec![b'x'; 5000]).expect("a file");
    fs::set_permissions(at("d/text"), fs::Permissions::from_mode(0o6755)).expect("rights");
    fs::hard_link(at("d/text"), at("again")).expect("a name");
    fs::write(at("f"), "new").expect("a file");
    symlink("../beside/file", at("link")).expect("a link");
    let mut stream = vec![];
    let layer = Layer::whole(dir.path());
    send(&layer, None, &mut |bytes| {
        stream.extend_from_slice(bytes);
        Ok(())
    })
    .expect("a pass");
    let [whole, cut] = [255, 7].map(|step| [&[step], &stream[..]].concat());
    vec![whole, cut, escape(1), escape(4), escape(7)]
}

/// A pass that names, in the record of this kind, what leads out.
fn escape(kind: u8) -> Vec<u8> {
    let meta = |mode: u32| {
        let mut meta = mode.to_le_bytes().to_vec();
        // Owner, group, seconds, nanoseconds, no attributes.
        meta.extend([0; 4 + 4 + 8 + 4 + 2]);
        meta
    };
    let name = |name: &[u8]| [&(name.len() as u16).to_le_bytes()[..], name].concat();
    let root = [&[1, 1, 0][..], &meta(0o040_755)].concat();
    let body = match kind {
        1 => [&[2][..], &name(b".."), &[0], &meta(0o040_755)].concat(),
        4 => [&[4][..], &name(b"b"), &meta(0o104_755), &3u64.to_le_bytes()].concat(),
        _ => [&[7][..], &name(b"x"), &name(b"away/file")].concat(),
    };
    let data = [&[5][..], &0u64.to_le_bytes(), &3u32.to_le_bytes(), b"own", &[6]].concat();
    [&[64][..], &root, &body, &data].concat()
}
