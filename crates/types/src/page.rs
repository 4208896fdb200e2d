//! Memory by the page: ranges, sets of them, and whose memory it is.

use std::{collections::BTreeMap, fmt};

use thiserror::Error;

/// Bytes of a page, and what every range is a multiple of. Hosts with another
/// page size are told apart in preflight and refused.
pub const PAGE: u64 = 4096;

/// One past the highest user address on the machines we run on (x86-64 with
/// four levels of page tables; arm64 with 48 bits has more and uses less).
pub const ADDRESS_LIMIT: u64 = 1 << 47;

/// Whose pages these are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// The private memory of a process, named by its id in the container's
    /// pid namespace, as CRIU names its images.
    Process(u32),
    /// A shared object (anonymous shared memory, memfd, SysV segment), named
    /// by its inode number; ranges are offsets.
    Shared(u64),
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Space::Process(pid) => write!(f, "process {pid}"),
            Space::Shared(object) => write!(f, "shared object {object}"),
        }
    }
}

/// Pages from `start` up to `end`, in bytes; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    start: u64,
    end: u64,
}

/// Numbers that are no range of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{start:#x}..{end:#x} is no range of whole pages")]
pub struct InvalidRange {
    start: u64,
    end: u64,
}

impl PageRange {
    pub fn new(start: u64, end: u64) -> Result<Self, InvalidRange> {
        let whole = start.is_multiple_of(PAGE) && end.is_multiple_of(PAGE);
        if whole && start < end && end <= ADDRESS_LIMIT {
            Ok(Self { start, end })
        } else {
            Err(InvalidRange { start, end })
        }
    }

    /// `pages` pages from `start` on.
    pub fn of_pages(start: u64, pages: u64) -> Result<Self, InvalidRange> {
        let end = pages.checked_mul(PAGE).and_then(|bytes| start.checked_add(bytes));
        Self::new(start, end.unwrap_or(0))
    }

    pub fn start(self) -> u64 {
        self.start
    }

    pub fn end(self) -> u64 {
        self.end
    }

    pub fn bytes(self) -> u64 {
        self.end - self.start
    }

    pub fn pages(self) -> u64 {
        self.bytes() / PAGE
    }

    pub fn contains(self, address: u64) -> bool {
        (self.start..self.end).contains(&address)
    }

    pub fn intersection(self, other: PageRange) -> Option<PageRange> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(PageRange { start, end })
    }

    /// The first `pages` pages (at least one), and the rest if there is any.
    pub fn split(self, pages: u64) -> (PageRange, Option<PageRange>) {
        let at = self.start.saturating_add(pages.max(1).saturating_mul(PAGE)).min(self.end);
        let rest = (at < self.end).then_some(PageRange { start: at, end: self.end });
        (PageRange { start: self.start, end: at }, rest)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

/// A set of pages, kept as the fewest ranges, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageSet(BTreeMap<u64, u64>);

impl PageSet {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many ranges it takes.
    pub fn ranges(&self) -> usize {
        self.0.len()
    }

    pub fn pages(&self) -> u64 {
        self.iter().map(PageRange::pages).sum()
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = PageRange> + '_ {
        self.0.iter().map(|(&start, &end)| PageRange { start, end })
    }

    /// The range around an address, if that is in the set.
    pub fn around(&self, address: u64) -> Option<PageRange> {
        let (&start, &end) = self.0.range(..=address).next_back()?;
        (address < end).then_some(PageRange { start, end })
    }

    pub fn contains(&self, address: u64) -> bool {
        self.around(address).is_some()
    }

    /// The parts of the set that lie in `range`.
    pub fn within(&self, range: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        let first = self.around(range.start).map_or(range.start, PageRange::start);
        self.0
            .range(first..range.end)
            .filter_map(move |(&start, &end)| PageRange { start, end }.intersection(range))
    }

    pub fn insert(&mut self, range: PageRange) {
        let (mut start, mut end) = (range.start, range.end);
        // Neighbours that touch become one with it.
        if let Some((&before, &until)) = self.0.range(..=start).next_back()
            && until >= start
        {
            start = before;
            end = end.max(until);
        }
        while let Some((&next, &until)) = self.0.range(start..=end).next() {
            self.0.remove(&next);
            end = end.max(until);
        }
        self.0.insert(start, end);
    }

    pub fn remove(&mut self, range: PageRange) {
        if let Some(before) = self.around(range.start)
            && before.start < range.start
        {
            self.0.insert(before.start, range.start);
            if before.end > range.start {
                self.0.insert(range.start, before.end);
            }
        }
        while let Some((&start, &end)) = self.0.range(range.start..range.end).next() {
            self.0.remove(&start);
            if end > range.end {
                self.0.insert(range.end, end);
            }
        }
    }

    pub fn extend(&mut self, other: &PageSet) {
        for range in other.iter() {
            self.insert(range);
        }
    }

    pub fn subtract(&mut self, other: &PageSet) {
        for range in other.iter() {
            self.remove(range);
        }
    }

    pub fn intersection(&self, other: &PageSet) -> PageSet {
        other.iter().flat_map(|range| self.within(range)).collect()
    }
}

impl FromIterator<PageRange> for PageSet {
    fn from_iter<I: IntoIterator<Item = PageRange>>(ranges: I) -> Self {
        let mut set = Self::new();
        for range in ranges {
            set.insert(range);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, last: u64) -> PageRange {
        PageRange::new(first * PAGE, last * PAGE).unwrap()
    }

    fn set(ranges: &[(u64, u64)]) -> PageSet {
        ranges.iter().map(|&(first, last)| range(first, last)).collect()
    }

    #[test]
    fn only_whole_pages_below_the_limit_are_ranges() {
        for (start, end) in [(0, 0), (PAGE, PAGE), (2 * PAGE, PAGE), (1, PAGE), (0, PAGE + 1)] {
            assert!(PageRange::new(start, end).is_err(), "{start}..{end}");
        }
        assert!(PageRange::new(0, ADDRESS_LIMIT + PAGE).is_err());
        assert!(PageRange::of_pages(PAGE, u64::MAX).is_err());
        assert!(PageRange::of_pages(PAGE, 0).is_err());
        assert_eq!(PageRange::of_pages(PAGE, 2), PageRange::new(PAGE, 3 * PAGE));
    }

    #[test]
    fn a_split_loses_nothing() {
        assert_eq!(range(0, 5).split(2), (range(0, 2), Some(range(2, 5))));
        assert_eq!(range(0, 5).split(5), (range(0, 5), None));
        assert_eq!(range(0, 5).split(u64::MAX), (range(0, 5), None));
        assert_eq!(range(0, 5).split(0), (range(0, 1), Some(range(1, 5))));
    }

    #[test]
    fn ranges_that_touch_are_one() {
        let mut pages = set(&[(0, 2), (4, 6), (8, 9)]);
        pages.insert(range(2, 4));
        assert_eq!(pages, set(&[(0, 6), (8, 9)]));
        assert_eq!(pages.ranges(), 2);
        pages.insert(range(5, 20));
        assert_eq!(pages.iter().collect::<Vec<_>>(), [range(0, 20)]);
    }

    /// Against the plainest set there is, with every small range.
    #[test]
    fn it_is_a_set() {
        const SIZE: u64 = 7;
        let ranges: Vec<_> = (0..SIZE).flat_map(|a| (a + 1..=SIZE).map(move |b| (a, b))).collect();
        let plain = |set: &PageSet| -> Vec<bool> {
            (0..SIZE).map(|page| set.contains(page * PAGE)).collect()
        };
        for bits in 0..1u64 << SIZE {
            let member = |page: u64| bits >> page & 1 == 1;
            let whole: PageSet =
                (0..SIZE).filter(|p| member(*p)).map(|p| range(p, p + 1)).collect();
            assert_eq!(whole.pages(), u64::from(bits.count_ones()));
            for &(a, b) in &ranges {
                let inside = |page: u64| (a..b).contains(&page);
                let expect = |f: &dyn Fn(u64) -> bool| (0..SIZE).map(f).collect::<Vec<bool>>();
                let mut more = whole.clone();
                more.insert(range(a, b));
                assert_eq!(plain(&more), expect(&|p| member(p) || inside(p)));
                let mut less = whole.clone();
                less.remove(range(a, b));
                assert_eq!(plain(&less), expect(&|p| member(p) && !inside(p)));
                let within: PageSet = whole.within(range(a, b)).collect();
                assert_eq!(plain(&within), expect(&|p| member(p) && inside(p)));
                for set in [&more, &less, &within] {
                    let ends: Vec<_> = set.iter().collect();
                    assert!(ends.windows(2).all(|w| w[0].end() < w[1].start()), "{set:?}");
                }
            }
        }
    }
}
