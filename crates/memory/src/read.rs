//! Copies pages out of another process, without its help.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
};

use transship_types::{PAGE, PageRange};

use crate::{MemoryError, maps, spaces::Process, sys};

/// Bytes copied by one call. More gains nothing, and the processor's cache
/// likes less.
const AT_ONCE: usize = 1 << 20;

/// Copies `ranges`, one after the other, into `into`. Answers those that are
/// not there (any more); their bytes are zero.
pub(crate) fn read(
    process: &Process,
    ranges: &[PageRange],
    into: &mut [u8],
) -> Result<Vec<PageRange>, MemoryError> {
    let bytes: u64 = ranges.iter().map(|range| range.bytes()).sum();
    if bytes != into.len() as u64 {
        let message = format!("{} bytes were given for {bytes} bytes of pages", into.len());
        return Err(MemoryError::Invalid(message));
    }
    let failed =
        |source| MemoryError::Process { what: "reading the memory", pid: process.pid, source };
    let gone = match copy(process.pid, ranges, into) {
        Err(error) if maps::gone(&error) => None,
        done => Some(done.map_err(failed)?),
    };
    // The number may have been used again meanwhile, and then all of this is
    // a stranger's memory.
    match gone {
        Some(gone) if sys::process::exists(process.handle.as_fd()) => Ok(gone),
        _ => {
            into.fill(0);
            Ok(ranges.to_vec())
        }
    }
}

/// What is left to be copied of a list of ranges.
struct Cursor<'a> {
    ranges: &'a [PageRange],
    /// Bytes of the first that are behind us.
    within: u64,
}

impl Cursor<'_> {
    /// Where we are, and how much there is in one piece.
    fn here(&self) -> Option<(u64, usize)> {
        let range = self.ranges.first()?;
        Some((range.start() + self.within, (range.bytes() - self.within) as usize))
    }

    /// As much as one call may copy.
    fn vector(&self) -> Vec<(u64, usize)> {
        let rest = self.ranges.iter().skip(1).map(|range| (range.start(), range.bytes() as usize));
        let mut room = AT_ONCE;
        self.here()
            .into_iter()
            .chain(rest)
            .take(sys::process::VECTORS)
            .map_while(|(address, bytes)| {
                let bytes = bytes.min(room);
                room -= bytes;
                (bytes > 0).then_some((address, bytes))
            })
            .collect()
    }

    fn advance(&mut self, bytes: usize) {
        self.within += bytes as u64;
        while let Some((first, rest)) = self.ranges.split_first()
            && self.within >= first.bytes()
        {
            self.within -= first.bytes();
            self.ranges = rest;
        }
    }
}

fn copy(pid: i32, ranges: &[PageRange], into: &mut [u8]) -> io::Result<Vec<PageRange>> {
    let mut cursor = Cursor { ranges, within: 0 };
    let mut done = 0;
    let mut gone = Vec::new();
    let mut file = None;
    while cursor.here().is_some() {
        let vector = cursor.vector();
        let bytes = vector.iter().map(|(_, bytes)| bytes).sum();
        let copied = readable(sys::process::read(pid, &vector, &mut into[done..][..bytes]))?;
        cursor.advance(copied);
        done += copied;
        if copied == bytes {
            continue;
        }
        // The next page may not be read by the process itself (PROT_NONE). A
        // debugger may.
        let Some((address, bytes)) = cursor.here() else { break };
        let file = match &mut file {
            Some(file) => file,
            none => none.insert(File::open(format!("/proc/{pid}/mem"))?),
        };
        let forced = file.read_at(&mut into[done..][..bytes.min(AT_ONCE)], address);
        let mut passed = readable(forced)?;
        if passed == 0 {
            gone.extend(PageRange::of_pages(address, 1));
            passed = PAGE as usize;
            into[done..][..passed].fill(0);
        }
        cursor.advance(passed);
        done += passed;
    }
    Ok(gone)
}

/// How many bytes were copied as whole pages; none if there is nothing at the
/// first address.
fn readable(copied: io::Result<usize>) -> io::Result<usize> {
    match copied {
        Ok(bytes) => Ok(bytes / PAGE as usize * PAGE as usize),
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EIO | libc::ENOMEM)) =>
        {
            Ok(0)
        }
        Err(error) => Err(error),
    }
}
