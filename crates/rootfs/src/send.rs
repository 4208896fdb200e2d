//! Second half of a pass: sends what the walk has marked.
//!
//! While the container runs, an entry may change or vanish at any moment.
//! That is no error: what the index says of an entry was read *before* its
//! content, so whatever happened since then makes the next pass send it
//! again. In the pass over the frozen container it is an error, because then
//! somebody outside the container writes to its files.

use std::{
    collections::HashMap,
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
};

use rustix::{
    fs::{self, FileType, Mode, OFlags, SeekFrom},
    io::Errno,
};

use crate::{
    Index, Layer, RootfsError, Totals,
    entry::Handle,
    format::{MAX_ATTRIBUTES, MAX_DATA, Meta, Name, Record, VERSION},
    index::{Children, Known, Mark, Stamp},
    sys,
    walk::{Directory, Seen, Walk, What},
};

/// Bytes per call of the sink: large enough that a call costs nothing, small
/// enough that the target works while we read on.
const CHUNK: usize = 256 << 10;

/// One pass over the layer of a running container: everything, or what
/// changed since `before`, removals included. The index is for the next pass.
pub fn send(
    layer: &Layer,
    before: Option<&Index>,
    sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(Index, Totals), RootfsError> {
    Pass::new(layer, false, sink)?.run(before)
}

/// The last pass: the container is frozen, so this completes the layer. A
/// change while it runs is [`RootfsError::Changed`].
pub fn send_frozen(
    layer: &Layer,
    before: Option<&Index>,
    sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(Index, Totals), RootfsError> {
    Pass::new(layer, true, sink)?.run(before)
}

struct Pass<'a> {
    walk: Walk<'a>,
    frozen: bool,
    out: Output<'a>,
    /// First name sent of each file that has several.
    first_names: HashMap<(u64, u64), Vec<Name>>,
    /// Names from the root to the current directory, and the same as a path.
    names: Vec<Name>,
    path: PathBuf,
    /// The directory at `path` in the merged mount, while it is needed.
    directory: Option<OwnedFd>,
}

impl<'a> Pass<'a> {
    fn new(
        layer: &'a Layer,
        frozen: bool,
        sink: &'a mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<Self, RootfsError> {
        Ok(Self {
            walk: Walk::new(layer, frozen)?,
            frozen,
            out: Output { sink, buffer: vec![VERSION], totals: Totals::default() },
            first_names: HashMap::new(),
            names: Vec::new(),
            path: PathBuf::new(),
            directory: None,
        })
    }

    fn run(mut self, before: Option<&Index>) -> Result<(Index, Totals), RootfsError> {
        let seen = self.walk.run(before)?;
        let Some(handle) = self.open_handle(None)? else {
            return Err(self.changed());
        };
        let meta = self.meta(&handle)?;
        self.out.record(&Record::Root { replace: seen.replace, meta })?;
        let known = before.map(|index| &index.root);
        let children = self.children(&seen, known)?;
        let totals = self.out.finish()?;
        let root = Known { mark: Mark::Entry(seen.stamp), children };
        tracing::debug!(
            entries = totals.entries,
            content_bytes = totals.bytes,
            frozen = self.frozen,
            "pass over the writable layer"
        );
        Ok((Index { root }, totals))
    }

    /// Sends what is marked below the current directory; returns what the
    /// target then knows of it.
    fn children(
        &mut self,
        directory: &Directory,
        known: Option<&Known>,
    ) -> Result<Children, RootfsError> {
        // As in the walk: what was replaced starts from nothing.
        let known = known.filter(|_| !directory.replace);
        let mut children = Children::new();
        for seen in &directory.children {
            let before = known.and_then(|k| k.children.get(&seen.name));
            if let Some(after) = self.child(seen, before)? {
                children.insert(seen.name.clone(), after);
            }
        }
        Ok(children)
    }

    /// None: nothing is known of what the target has there.
    fn child(&mut self, seen: &Seen, before: Option<&Known>) -> Result<Option<Known>, RootfsError> {
        let name = self.walk.name(&seen.name, &self.path)?;
        self.path.push(OsStr::from_bytes(&seen.name));
        let known = |stamp, children| Some(Known { mark: Mark::Entry(stamp), children });
        let after = match &seen.what {
            What::Gone => {
                if seen.send {
                    self.out.entry(&Record::Remove { name })?;
                }
                Some(Known::ABSENT)
            }
            What::Directory(directory) => {
                let entered = !seen.send || self.enter(&name, directory.replace)?;
                if entered {
                    self.names.push(name);
                    self.directory = None;
                    let children = self.children(directory, before)?;
                    self.directory = None;
                    self.names.pop();
                    if seen.send {
                        self.out.record(&Record::Leave)?;
                    }
                    known(directory.stamp, children)
                } else {
                    before.map(Known::doubted)
                }
            }
            What::Other { stamp, linked } => {
                if !seen.send || self.other(name, stamp, *linked)? {
                    known(*stamp, Children::new())
                } else {
                    before.map(Known::doubted)
                }
            }
        };
        self.path.pop();
        Ok(after)
    }

    /// False if it is no longer there.
    fn enter(&mut self, name: &Name, replace: bool) -> Result<bool, RootfsError> {
        let Some(handle) = self.open_handle(Some(name))? else { return self.lost() };
        let stat = self.examine(&handle)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return self.lost();
        }
        let meta = self.meta(&handle)?;
        self.out.entry(&Record::Enter { name: name.clone(), replace, meta })?;
        Ok(true)
    }

    /// False if it is no longer there.
    fn other(&mut self, name: Name, seen: &Stamp, linked: bool) -> Result<bool, RootfsError> {
        if linked && let Some(first) = self.first_names.get(&seen.object()) {
            let first = first.clone();
            self.out.entry(&Record::Link { name, first })?;
            return Ok(true);
        }
        let Some(handle) = self.open_handle(Some(&name))? else { return self.lost() };
        let stat = self.examine(&handle)?;
        if FileType::from_raw_mode(stat.st_mode) != seen.file_type() {
            return self.lost();
        }
        let meta = self.meta(&handle)?;
        let sent = match seen.file_type() {
            FileType::RegularFile => self.file(&name, meta)?,
            FileType::Symlink => {
                let directory = self.current()?;
                match fs::readlinkat(directory, name.as_bytes(), Vec::new()) {
                    Ok(target) => {
                        let target = target.into_bytes();
                        self.out.entry(&Record::Symlink { name: name.clone(), meta, target })?;
                        true
                    }
                    Err(Errno::NOENT | Errno::INVAL) => return self.lost(),
                    Err(errno) => return Err(self.failed("read the link", errno)),
                }
            }
            _ => {
                let device = stat.st_rdev;
                let (major, minor) = (fs::major(device), fs::minor(device));
                self.out.entry(&Record::Node { name: name.clone(), meta, major, minor })?;
                true
            }
        };
        if self.frozen && !seen.looks_like(&self.now(&handle)?) {
            return Err(self.changed());
        }
        if linked && sent {
            let path = self.names.iter().cloned().chain([name]).collect();
            self.first_names.insert(seen.object(), path);
        }
        Ok(sent)
    }

    fn file(&mut self, name: &Name, meta: Meta) -> Result<bool, RootfsError> {
        if !self.frozen {
            self.write_out()?;
        }
        let Some(file) = self.open_file(name)? else { return self.lost() };
        let stat = fs::fstat(&file).map_err(|e| self.failed("examine", e))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        self.out.entry(&Record::File { name: name.clone(), meta, size })?;
        let mut buffer = vec![0; MAX_DATA.min(size as usize)];
        let mut at = 0;
        // A file that grows meanwhile is read up to the size it had; the rest
        // comes with the next pass.
        while at < size {
            let start = match fs::seek(&file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // Only a hole is left.
                Err(Errno::NXIO) => break,
                // A file system that knows nothing of holes.
                Err(Errno::INVAL) => at,
                Err(errno) => return Err(self.failed("find the data of", errno)),
            };
            let end = fs::seek(&file, SeekFrom::Hole(start)).unwrap_or(size).min(size);
            at = start;
            while at < end {
                let wanted = (end - at).min(MAX_DATA as u64) as usize;
                let read = rustix::io::pread(&file, &mut buffer[..wanted], at)
                    .map_err(|e| self.failed("read", e))?;
                if read == 0 {
                    break;
                }
                self.out.data(at, &buffer[..read])?;
                at += read as u64;
            }
            if at < end {
                // It became shorter.
                break;
            }
        }
        self.out.record(&Record::FileEnd)?;
        Ok(true)
    }

    /// So that a store through a shared mapping, too, moves the ctime from
    /// here on. The pages belong to the file of the upper directory; a file
    /// that is not there is the image's and nobody has written to it.
    fn write_out(&self) -> Result<(), RootfsError> {
        let root = self.walk.upper.as_ref().unwrap_or(&self.walk.merged);
        let file = match root.file(&self.path) {
            Ok(file) => file,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => return Ok(()),
            Err(errno) => return Err(self.failed("open the layer's side of", errno)),
        };
        match sys::write_out(file.as_fd()) {
            // Something else took the name meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ESPIPE) => Ok(()),
            Err(source) => {
                let path = self.walk.merged_path(&self.path);
                Err(RootfsError::Io { doing: "write out", path, source })
            }
            Ok(()) => Ok(()),
        }
    }

    fn open_file(&mut self, name: &Name) -> Result<Option<OwnedFd>, RootfsError> {
        let plain = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let directory = self.current()?;
        let open = |flags| fs::openat(directory, name.as_bytes(), flags, Mode::empty());
        // Reading must not write access times; a foreign file may not allow
        // it (user namespaces), and then it costs that.
        let opened = open(plain | OFlags::NOATIME).or_else(|errno| match errno {
            Errno::PERM => open(plain),
            other => Err(other),
        });
        match opened {
            Ok(file) => {
                let stat = fs::fstat(&file).map_err(|e| self.failed("examine", e))?;
                let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
                Ok(regular.then_some(file))
            }
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => Ok(None),
            Err(errno) => Err(self.failed("open", errno)),
        }
    }

    fn lost(&self) -> Result<bool, RootfsError> {
        if self.frozen { Err(self.changed()) } else { Ok(false) }
    }

    fn changed(&self) -> RootfsError {
        RootfsError::Changed(self.walk.merged_path(&self.path))
    }

    /// The current directory in the merged mount.
    fn current(&mut self) -> Result<&OwnedFd, RootfsError> {
        if self.directory.is_none() {
            let path: PathBuf = self.names.iter().map(Name::as_path).collect();
            let opened = self.walk.merged.directory(&path);
            self.directory = Some(opened.map_err(|e| self.failed("open the directory", e))?);
        }
        Ok(self.directory.as_ref().expect("opened above"))
    }

    /// An entry of the current directory, or the directory itself; None if it
    /// has gone.
    fn open_handle(&mut self, name: Option<&Name>) -> Result<Option<Handle>, RootfsError> {
        let name = name.map_or(&b"."[..], Name::as_bytes);
        let gone = |errno| matches!(errno, Errno::NOENT | Errno::NOTDIR | Errno::LOOP);
        if self.directory.is_none() {
            let path: PathBuf = self.names.iter().map(Name::as_path).collect();
            match self.walk.merged.directory(&path) {
                Ok(directory) => self.directory = Some(directory),
                Err(errno) if gone(errno) => return Ok(None),
                Err(errno) => return Err(self.failed("open the directory", errno)),
            }
        }
        match Handle::open(self.current()?, name) {
            Ok(handle) => Ok(Some(handle)),
            Err(errno) if gone(errno) => Ok(None),
            Err(errno) => Err(self.failed("open", errno)),
        }
    }

    fn examine(&self, handle: &Handle) -> Result<fs::Stat, RootfsError> {
        handle.stat().map_err(|e| self.failed("examine", e))
    }

    fn meta(&self, handle: &Handle) -> Result<Meta, RootfsError> {
        let stat = self.examine(handle)?;
        let meta = handle.meta(&stat).map_err(|e| self.failed("read the attributes of", e))?;
        let size = meta.attributes.iter().map(|a| a.name.len() + a.value.len()).sum();
        if size > MAX_ATTRIBUTES {
            let (path, limit) = (self.walk.merged_path(&self.path), MAX_ATTRIBUTES);
            return Err(RootfsError::AttributesTooLarge { path, size, limit });
        }
        Ok(meta)
    }

    fn now(&self, handle: &Handle) -> Result<Stamp, RootfsError> {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        Ok(Stamp::new(&self.examine(handle)?, now, false))
    }

    fn failed(&self, doing: &'static str, errno: Errno) -> RootfsError {
        self.walk.failed(doing, &self.path, errno)
    }
}

/// Collects records into chunks for the sink, and counts.
struct Output<'a> {
    sink: &'a mut dyn FnMut(&[u8]) -> io::Result<()>,
    buffer: Vec<u8>,
    totals: Totals,
}

impl Output<'_> {
    fn entry(&mut self, record: &Record) -> Result<(), RootfsError> {
        self.totals.entries += 1;
        self.record(record)
    }

    fn record(&mut self, record: &Record) -> Result<(), RootfsError> {
        record.encode(&mut self.buffer);
        self.flush(CHUNK)
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), RootfsError> {
        self.totals.bytes += bytes.len() as u64;
        Record::Data { offset, length: bytes.len() as u32 }.encode(&mut self.buffer);
        self.buffer.extend(bytes);
        self.flush(CHUNK)
    }

    /// Hands on once at least `least` bytes have gathered.
    fn flush(&mut self, least: usize) -> Result<(), RootfsError> {
        if self.buffer.len() >= least {
            for chunk in self.buffer.chunks(CHUNK) {
                (self.sink)(chunk).map_err(RootfsError::Sink)?;
            }
            self.buffer.clear();
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Totals, RootfsError> {
        let Totals { entries, bytes } = self.totals;
        Record::End { entries, bytes }.encode(&mut self.buffer);
        self.flush(1)?;
        Ok(self.totals)
    }
}
