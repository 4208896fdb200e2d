//! The receiving side: cuts the stream into records, checks their order, and
//! has them applied ([`Tree`]).

use std::path::Path;

use rustix::fs::{self, Mode, OFlags};

use crate::{
    Problem, RootfsError, Totals,
    format::{Record, VERSION},
    tree::Tree,
    walk::MAX_ENTRIES,
};

/// Writes the file system that holds the container's root to disk. What the
/// container had made durable on the source is durable here only after this,
/// so it belongs before the source is told that the target is prepared; after
/// each pass it takes the load off the last call.
pub fn sync(root: &Path) -> Result<(), RootfsError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    fs::open(root, flags, Mode::empty())
        .and_then(fs::syncfs)
        .map_err(RootfsError::io("write to disk", root))
}

/// Applies one pass. After an error it does nothing more.
#[derive(Debug)]
pub struct Receiver {
    tree: Tree,
    state: State,
    /// The beginning of a record whose end has not arrived. The limits of the
    /// format bound it.
    pending: Vec<u8>,
    totals: Totals,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Version,
    Root,
    Records,
    /// So many bytes of content are still to come.
    Data(u64),
    Ended,
    Failed,
}

impl Receiver {
    /// `root` is the mounted root file system of the container.
    pub fn new(root: &Path) -> Result<Self, RootfsError> {
        let tree = Tree::open(root)?;
        let pending = Vec::new();
        Ok(Self { tree, state: State::Version, pending, totals: Totals::default() })
    }

    /// Takes the next bytes of the stream, cut anywhere.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), RootfsError> {
        if self.state == State::Failed {
            return Err(RootfsError::GivenUp);
        }
        let result = self.take(bytes);
        if result.is_err() {
            self.state = State::Failed;
        }
        result
    }

    /// The stream is complete: all of it has been applied.
    pub fn finish(self) -> Result<Totals, RootfsError> {
        match self.state {
            State::Ended => Ok(self.totals),
            State::Failed => Err(RootfsError::GivenUp),
            _ => Err(self.tree.malformed(Problem::Truncated)),
        }
    }

    fn take(&mut self, mut bytes: &[u8]) -> Result<(), RootfsError> {
        /// Added to an incomplete record at a time: most records are smaller.
        const STEP: usize = 4096;
        loop {
            if let State::Data(left) = self.state {
                let length = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let (data, rest) = bytes.split_at(length);
                bytes = rest;
                self.tree.write(data)?;
                self.totals.bytes += length as u64;
                let left = left - length as u64;
                self.state = if left == 0 { State::Records } else { State::Data(left) };
            }
            if bytes.is_empty() {
                return Ok(());
            }
            match self.state {
                State::Version => {
                    let (&version, rest) = bytes.split_first().expect("not empty");
                    if version != VERSION {
                        return Err(self.tree.malformed(Problem::Version(version)));
                    }
                    bytes = rest;
                    self.state = State::Root;
                    continue;
                }
                State::Ended => {
                    let problem = Problem::Place("bytes follow the end");
                    return Err(self.tree.malformed(problem));
                }
                _ => {}
            }
            if self.pending.is_empty() {
                match self.decode(bytes)? {
                    Some((record, used)) => {
                        bytes = &bytes[used..];
                        self.record(record)?;
                    }
                    None => {
                        self.pending.extend(bytes);
                        return Ok(());
                    }
                }
            } else {
                let before = self.pending.len();
                let added = bytes.len().min(STEP.max(before));
                self.pending.extend(&bytes[..added]);
                match self.decode(&self.pending)? {
                    Some((record, used)) => {
                        bytes = &bytes[used - before..];
                        self.pending.clear();
                        self.record(record)?;
                    }
                    None => bytes = &bytes[added..],
                }
            }
        }
    }

    fn decode(&self, bytes: &[u8]) -> Result<Option<(Record, usize)>, RootfsError> {
        Record::decode(bytes).map_err(|problem| self.tree.malformed(problem))
    }

    fn record(&mut self, record: Record) -> Result<(), RootfsError> {
        if self.state == State::Root {
            let Record::Root { replace, meta } = record else {
                return Err(self.tree.malformed(Problem::Place("the root must come first")));
            };
            self.state = State::Records;
            return self.tree.root(replace, &meta);
        }
        self.totals.entries += match &record {
            Record::Enter { .. }
            | Record::File { .. }
            | Record::Link { .. }
            | Record::Symlink { .. }
            | Record::Node { .. }
            | Record::Remove { .. } => 1,
            _ => 0,
        };
        if self.totals.entries > MAX_ENTRIES {
            return Err(RootfsError::TooManyEntries { limit: MAX_ENTRIES });
        }
        match record {
            Record::Root { .. } => {
                Err(self.tree.malformed(Problem::Place("the root must come only once")))
            }
            Record::Data { offset, length } => {
                self.tree.place_data(offset, length)?;
                if length > 0 {
                    self.state = State::Data(length.into());
                }
                Ok(())
            }
            Record::FileEnd => self.tree.file_end(),
            Record::End { entries, bytes } => {
                for (what, said, had) in
                    [("entries", entries, self.totals.entries), ("bytes", bytes, self.totals.bytes)]
                {
                    if said != had {
                        return Err(self.tree.malformed(Problem::Totals { what, said, had }));
                    }
                }
                self.tree.end()?;
                self.state = State::Ended;
                Ok(())
            }
            Record::Leave => self.tree.leave(),
            Record::Enter { name, replace, meta } => self.tree.enter(name, replace, &meta),
            Record::File { name, meta, size } => self.tree.file(name, meta, size),
            Record::Link { name, first } => self.tree.link(name, &first),
            Record::Symlink { name, meta, target } => self.tree.symlink(name, &meta, &target),
            Record::Node { name, meta, major, minor } => self.tree.node(name, &meta, major, minor),
            Record::Remove { name } => self.tree.remove_named(name),
        }
    }
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
