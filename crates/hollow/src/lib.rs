//! A library that CRIU is started with (`LD_PRELOAD`) for what travels beside
//! its images: shared objects.
//!
//! **Dump.** CRIU asks the object itself where it has data, by
//! lseek(SEEK_DATA): there is no file in `/proc` to cover as there is for
//! private memory. So this answers that one question, and only for the objects
//! of a list: "no data from here to the end". Every other call goes on to the
//! kernel as it is.
//!
//! The list is a file with a line `DEVICE INODE` per object, named in the
//! environment. It appears, complete, when the container stands still: before
//! that, and where there is none, CRIU sees everything. An object that CRIU has
//! seen after all is no harm: its images are then restored as they are.
//!
//! **Restore.** CRIU takes files from whoever starts it (`inherit_fd`), by
//! their numbers in its own table, but ours are made long after it was
//! started. So they come with the request, as descriptors do over such a
//! socket; CRIU does not look for any, and this puts them in their places: the
//! first at [`PLACE`], the others behind it. Where the library is missing, that
//! number is nobody's, and CRIU refuses the request.

mod sys;

use std::{env, fs, sync::OnceLock};

/// Names the file with the list.
const LIST: &str = "TRANSSHIP_HOLLOW_LIST";

/// Where the first descriptor goes that comes with a request; the gate, which
/// puts the numbers into the request, knows it too. Above what CRIU has open
/// by then, and below the usual limit (1024) and what CRIU keeps there.
const PLACE: i32 = 64;

/// Device and inode, as stat(2) tells them.
type Object = (u64, u64);

/// Whether this object is one that CRIU must find empty.
fn is_hollow(object: Object) -> bool {
    static OBJECTS: OnceLock<Vec<Object>> = OnceLock::new();
    if let Some(objects) = OBJECTS.get() {
        return objects.contains(&object);
    }
    let read = env::var_os(LIST).and_then(|path| fs::read_to_string(path).ok());
    let Some(objects) = read.map(|text| parse(&text)) else { return false };
    OBJECTS.get_or_init(|| objects).contains(&object)
}

fn parse(text: &str) -> Vec<Object> {
    let object = |line: &str| {
        let (device, inode) = line.split_once(' ')?;
        Some((device.parse().ok()?, inode.parse().ok()?))
    };
    text.lines().filter_map(object).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::Write,
        os::fd::AsRawFd,
        os::unix::{fs::MetadataExt, net::UnixStream},
        process::Command,
    };

    use super::*;

    #[test]
    fn a_list_is_lines_of_numbers() {
        assert_eq!(parse("1 77\n18446744073709551615 2\n"), [(1, 77), (u64::MAX, 2)]);
        assert_eq!(parse("1\n\nx 2\n1 -2\n3 4"), [(3, 4)]);
    }

    /// In a process of its own: what was read of the list stays for good. The
    /// test program is one that has the calls in it.
    #[test]
    fn only_listed_objects_are_empty() {
        const ROLE: &str = "HOLLOW_TEST_FILES";
        let Some(dir) = env::var_os(ROLE) else {
            let dir = env::temp_dir().join(format!("hollow-{}", std::process::id()));
            fs::create_dir(&dir).unwrap();
            let mut again = Command::new(env::current_exe().unwrap());
            again.args(["--exact", "tests::only_listed_objects_are_empty"]);
            let status = again.env(ROLE, &dir).env(LIST, dir.join("list")).status().unwrap();
            fs::remove_dir_all(&dir).unwrap();
            assert!(status.success());
            return;
        };
        let files = ["listed", "other"].map(|name| {
            let path = std::path::Path::new(&dir).join(name);
            let mut file = File::create(&path).unwrap();
            file.write_all(b"contents").unwrap();
            file
        });
        assert_eq!(files.each_ref().map(sys::data), [Some(0), Some(0)], "no list yet");
        let object = sys::object(std::os::fd::AsRawFd::as_raw_fd(&files[0])).unwrap();
        let list = std::path::Path::new(&dir).join("list");
        fs::write(&list, format!("{} {}\n", object.0, object.1)).unwrap();
        assert_eq!(files.each_ref().map(sys::data), [None, Some(0)]);
        assert_eq!(sys::end(&files[0]), 8, "every other question goes to the kernel");
    }

    /// In one test, because the places are the process's.
    #[test]
    fn descriptors_that_come_with_a_request_get_their_places() {
        let (gate, criu) = UnixStream::pair().unwrap();
        let files = ["/dev/null", "/dev/zero"].map(|path| File::open(path).unwrap());
        let numbers = files.each_ref().map(|file| file.as_raw_fd());
        let device = |number: i32| {
            let meta = fs::metadata(format!("/proc/self/fd/{number}"));
            meta.map(|meta| meta.rdev()).ok()
        };
        let mut bytes = [0; 16];
        sys::send(&gate, b"plain", &[]);
        assert_eq!(sys::received(&criu, &mut bytes, 0), 5);
        assert_eq!((&bytes[..5], device(PLACE)), (&b"plain"[..], None));

        sys::send(&gate, b"request", &numbers);
        assert_eq!(sys::received(&criu, &mut bytes, libc::MSG_PEEK), 7);
        assert_eq!(device(PLACE), None, "who only looks takes nothing");
        assert_eq!(sys::received(&criu, &mut bytes, 0), 7);
        let places = [PLACE, PLACE + 1].map(device);
        assert_eq!(places, files.each_ref().map(|file| Some(file.metadata().unwrap().rdev())));

        sys::send(&gate, b"again", &numbers[..1]);
        assert_eq!(sys::received(&criu, &mut bytes, 0), -1, "its place is taken");
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EBUSY));
    }
}
