//! A batch as a message, and everything that must be true of one that came.

use bytes::Bytes;
use transship_api::session::{Batch, SpaceName, space_name::Space as Name};
use transship_memory::codec::{self, BATCH_PAGES, Codec};
use transship_types::{PAGE, PageRange, PageSet, Space};

use crate::MigrationError;

/// PID_MAX_LIMIT of the kernel (proc_sys_kernel(5)).
const PID_LIMIT: u32 = 1 << 22;

/// memfd_create(2) takes no longer name.
const MAX_MEMFD_NAME: usize = 249;

/// A batch that was checked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Checked {
    pub round: u32,
    pub space: Space,
    pub pages: Vec<PageRange>,
    pub zeros: Vec<PageRange>,
    pub codec: Codec,
    /// What the object is called, if it is a memfd.
    pub memfd: Option<Bytes>,
    /// At most as long as the pages themselves.
    pub wire_bytes: usize,
}

impl Checked {
    pub fn new(batch: &Batch) -> Result<Self, MigrationError> {
        let space = space(batch.space.as_ref())?;
        let pages = ranges(&batch.pages, BATCH_PAGES)?;
        let count = |ranges: &[PageRange]| ranges.iter().map(|r| r.pages()).sum::<u64>();
        let zeros = ranges(&batch.zeros, BATCH_PAGES - count(&pages))?;
        if pages.is_empty() && zeros.is_empty() {
            return Err(MigrationError::malformed("a batch without pages"));
        }
        let full: PageSet = pages.iter().copied().collect();
        if let Some(twice) = zeros.iter().find_map(|zero| full.within(*zero).next()) {
            let what = format!("a batch that has {twice} twice");
            return Err(MigrationError::malformed(what));
        }
        let codec = Codec::from_number(batch.codec)?;
        // At most BATCH_PAGES pages.
        let length = (count(&pages) * PAGE) as usize;
        let wire_bytes = batch.wire_bytes as usize;
        let fits = match codec {
            Codec::Raw => wire_bytes == length,
            Codec::Lz4 | Codec::Zstd => wire_bytes > 0 && wire_bytes < length,
        };
        if !fits {
            let what = format!("a batch of {wire_bytes} bytes for {length} of pages");
            return Err(MigrationError::malformed(what));
        }
        let memfd = batch.memfd.clone();
        let named = |name: &Bytes| {
            matches!(space, Space::Shared(_)) && name.len() <= MAX_MEMFD_NAME && !name.contains(&0)
        };
        if !memfd.as_ref().is_none_or(named) {
            return Err(MigrationError::malformed(format!("a name for {space} that is none")));
        }
        Ok(Self { round: batch.round, space, pages, zeros, codec, memfd, wire_bytes })
    }

    /// Of the pages, once they are expanded.
    pub fn length(&self) -> usize {
        self.pages.iter().map(|range| range.bytes() as usize).sum()
    }
}

/// What was read, sorted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Sorted {
    pub pages: Vec<PageRange>,
    pub zeros: Vec<PageRange>,
    /// How many bytes of the buffer the pages now take, from its start.
    pub length: usize,
}

/// Tells the pages of `ranges`, whose bytes are `bytes`, from those that are
/// zero and those that are gone; moves what is to be sent together.
pub(crate) fn sort(ranges: &[PageRange], gone: Vec<PageRange>, bytes: &mut [u8]) -> Sorted {
    const P: usize = PAGE as usize;
    let gone: PageSet = gone.into_iter().collect();
    let mut sorted = Sorted::default();
    let mut at = 0;
    for range in ranges {
        for start in (range.start()..range.end()).step_by(P) {
            let page = at..at + P;
            at += P;
            if gone.contains(start) {
                continue;
            }
            if codec::is_zero(&bytes[page.clone()]) {
                push(&mut sorted.zeros, start);
                continue;
            }
            push(&mut sorted.pages, start);
            if page.start != sorted.length {
                bytes.copy_within(page, sorted.length);
            }
            sorted.length += P;
        }
    }
    sorted
}

/// Appends one page, to the last range if it follows it.
fn push(ranges: &mut Vec<PageRange>, start: u64) {
    let first = match ranges.last() {
        Some(last) if last.end() == start => ranges.pop().map_or(start, PageRange::start),
        _ => start,
    };
    // A page of a range, or one of several that touch: never refused.
    ranges.extend(PageRange::new(first, start + PAGE));
}

/// As messages carry them: start, count, start, count, in pages.
pub(crate) fn numbers(ranges: impl IntoIterator<Item = PageRange>) -> Vec<u64> {
    ranges.into_iter().flat_map(|range| [range.start() / PAGE, range.pages()]).collect()
}

/// The ranges of a message: ascending, apart from one another, and of at most
/// `most` pages altogether.
pub(crate) fn ranges(numbers: &[u64], most: u64) -> Result<Vec<PageRange>, MigrationError> {
    let wrong = |what: String| MigrationError::malformed(format!("{what} in a list of pages"));
    // Each range has a page at least, so `most` bounds the list as well.
    if numbers.len() as u64 / 2 > most {
        return Err(wrong(format!("more than {most} pages")));
    }
    let (pairs, []) = numbers.as_chunks::<2>() else {
        return Err(wrong("half a range".into()));
    };
    let mut found = Vec::with_capacity(pairs.len());
    let (mut end, mut total) = (0, 0_u64);
    for &[start, count] in pairs {
        let range = start
            .checked_mul(PAGE)
            .and_then(|start| PageRange::of_pages(start, count).ok())
            .ok_or_else(|| wrong(format!("page {start} and {count} pages")))?;
        total = total.saturating_add(count);
        if range.start() < end || total > most {
            return Err(wrong(format!("{range} out of order, or beyond {most} pages")));
        }
        end = range.end();
        found.push(range);
    }
    Ok(found)
}

pub(crate) fn space_name(space: Space) -> SpaceName {
    let name = match space {
        Space::Process(pid) => Name::Process(pid),
        Space::Shared(object) => Name::Shared(object),
    };
    SpaceName { space: Some(name) }
}

pub(crate) fn space(name: Option<&SpaceName>) -> Result<Space, MigrationError> {
    match name.and_then(|name| name.space.as_ref()) {
        Some(&Name::Process(pid)) if (1..=PID_LIMIT).contains(&pid) => Ok(Space::Process(pid)),
        Some(&Name::Shared(object)) => Ok(Space::Shared(object)),
        other => Err(MigrationError::malformed(format!("pages of {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: usize = PAGE as usize;

    fn range(first: u64, last: u64) -> PageRange {
        PageRange::new(first * PAGE, last * PAGE).unwrap()
    }

    fn good() -> Batch {
        Batch {
            round: 1,
            space: Some(space_name(Space::Process(7))),
            pages: vec![1, 2, 4, 1],
            zeros: vec![3, 1, 9, 10],
            codec: 0,
            wire_bytes: 3 * PAGE as u32,
            memfd: None,
        }
    }

    #[test]
    fn a_good_batch_is_understood() {
        let checked = Checked::new(&good()).unwrap();
        assert_eq!(checked.space, Space::Process(7));
        assert_eq!(checked.pages, [range(1, 3), range(4, 5)]);
        assert_eq!(checked.zeros, [range(3, 4), range(9, 19)]);
        assert_eq!((checked.length(), checked.wire_bytes), (3 * P, 3 * P));
        assert_eq!(numbers(checked.pages), good().pages);
        let space = Some(space_name(Space::Shared(7)));
        let named = Batch { space, memfd: Some(Bytes::new()), ..good() };
        assert_eq!(Checked::new(&named).unwrap().memfd, Some(Bytes::new()));
    }

    #[test]
    fn hostile_batches_are_refused() {
        const TOP: u64 = transship_types::ADDRESS_LIMIT / PAGE;
        type Spoil = fn(&mut Batch);
        let cases: &[(&str, Spoil)] = &[
            ("no space", |b| b.space = None),
            ("a space of nobody", |b| b.space = Some(SpaceName { space: None })),
            ("pid 0", |b| b.space = Some(space_name(Space::Process(0)))),
            ("a pid that is none", |b| b.space = Some(space_name(Space::Process(u32::MAX)))),
            ("half a range", |b| b.pages.truncate(3)),
            ("an empty range", |b| b.pages[1] = 0),
            ("overlapping ranges", |b| b.pages = vec![1, 2, 2, 1]),
            ("descending ranges", |b| b.pages = vec![4, 1, 1, 2]),
            ("the same page twice", |b| b.pages = vec![1, 1, 1, 2]),
            ("full and zero", |b| b.zeros = vec![2, 1]),
            ("beyond the top", |b| b.pages = vec![TOP - 2, 3]),
            ("overflow", |b| b.pages = vec![u64::MAX / 2, 3]),
            ("overflow of the end", |b| b.pages = vec![1, u64::MAX]),
            ("too many pages", |b| {
                b.pages = vec![1, 257];
                b.zeros.clear();
                b.wire_bytes = 257 * PAGE as u32;
            }),
            ("too many zeros", |b| b.zeros = vec![100, 254]),
            ("too many ranges", |b| b.zeros = (50..700).flat_map(|p| [2 * p, 1]).collect()),
            ("nothing", |b| *b = Batch { space: b.space, ..Batch::default() }),
            ("an unknown codec", |b| b.codec = 3),
            ("too few bytes", |b| b.wire_bytes -= 1),
            ("too many bytes", |b| b.wire_bytes += 1),
            ("compressed to nothing", |b| (b.codec, b.wire_bytes) = (1, 0)),
            ("compressed to more", |b| b.codec = 2),
            ("a name of a process", |b| b.memfd = Some(Bytes::from_static(b"name"))),
            ("a name too long", |b| {
                b.space = Some(space_name(Space::Shared(7)));
                b.memfd = Some(vec![b'x'; 250].into());
            }),
            ("a name that ends early", |b| {
                b.space = Some(space_name(Space::Shared(7)));
                b.memfd = Some(Bytes::from_static(b"x\0y"));
            }),
            ("bytes for zeros", |b| (b.pages, b.wire_bytes) = (vec![], 1)),
        ];
        for (case, spoil) in cases {
            let mut batch = good();
            spoil(&mut batch);
            assert!(Checked::new(&batch).is_err(), "{case}");
        }
        assert!(Checked::new(&good()).is_ok());
    }

    #[test]
    fn pages_are_sorted_and_stay_in_order() {
        let mut bytes = vec![0; 6 * P];
        for page in [0, 2, 3, 5] {
            bytes[page * P] = page as u8 + 1;
        }
        // Pages 10..14 and 20..22; of these 11 and 20 are zero, 12 is gone.
        let ranges = [range(10, 14), range(20, 22)];
        let sorted = sort(&ranges, vec![range(12, 13)], &mut bytes);
        assert_eq!(sorted.pages, [range(10, 11), range(13, 14), range(21, 22)]);
        assert_eq!(sorted.zeros, [range(11, 12), range(20, 21)]);
        assert_eq!(sorted.length, 3 * P);
        let first: Vec<u8> = bytes[..sorted.length].iter().copied().step_by(P).collect();
        assert_eq!(first, [1, 4, 6]);

        let whole = sort(&[range(1, 4)], vec![], &mut vec![1; 3 * P]);
        assert_eq!((whole.pages, whole.length), (vec![range(1, 4)], 3 * P));
        assert_eq!(sort(&[range(1, 2)], vec![range(0, 9)], &mut [0; P]), Sorted::default());
    }
}
