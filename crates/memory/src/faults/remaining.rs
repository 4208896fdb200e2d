//! What an address space still waits for, and from where in the store.

use std::collections::BTreeMap;

use transship_types::{PageRange, PageSet};

/// Stretches by their address now, each with the address it had on the source
/// (its home): a process may have moved its memory since.
#[derive(Debug, Clone, Default)]
pub(super) struct Remaining {
    now: BTreeMap<u64, (u64, u64)>,
    homes: PageSet,
}

impl Remaining {
    pub fn new(pages: &PageSet) -> Self {
        let now = pages.iter().map(|range| (range.start(), (range.end(), range.start()))).collect();
        Self { now, homes: pages.clone() }
    }

    pub fn is_empty(&self) -> bool {
        self.now.is_empty()
    }

    pub fn homes(&self) -> &PageSet {
        &self.homes
    }

    /// The parts of a range that are waited for, with the home of each.
    pub fn within(&self, range: PageRange) -> Vec<(PageRange, PageRange)> {
        let first = self.now.range(..=range.start()).next_back().map_or(range.start(), |(s, _)| *s);
        let parts = self.now.range(first..range.end()).filter_map(|(&start, &(end, home))| {
            let part = PageRange::new(start, end).ok()?.intersection(range)?;
            let home = PageRange::of_pages(home + (part.start() - start), part.pages()).ok()?;
            Some((part, home))
        });
        parts.collect()
    }

    /// The first stretch that ends after an address, from there on.
    pub fn from(&self, address: u64) -> Option<PageRange> {
        let around = self.now.range(..=address).next_back().filter(|(_, (end, _))| *end > address);
        let (start, (end, _)) = around.or_else(|| self.now.range(address..).next())?;
        PageRange::new(address.max(*start), *end).ok()
    }

    /// Answers the homes of what was taken out.
    pub fn remove(&mut self, range: PageRange) -> Vec<PageRange> {
        let mut gone = Vec::new();
        for (part, home) in self.within(range) {
            let Some((&start, &(end, first))) = self.now.range(..=part.start()).next_back() else {
                continue;
            };
            self.now.remove(&start);
            if start < part.start() {
                self.now.insert(start, (part.start(), first));
            }
            if part.end() < end {
                self.now.insert(part.end(), (end, first + (part.end() - start)));
            }
            self.homes.remove(home);
            gone.push(home);
        }
        gone
    }

    /// Memory has moved; answers the homes of what it replaced.
    pub fn shift(&mut self, from: PageRange, to: PageRange) -> Vec<PageRange> {
        let parts = self.within(from);
        self.remove(from);
        let replaced = self.remove(to);
        for (part, home) in parts {
            let start = to.start() + (part.start() - from.start());
            self.now.insert(start, (start + part.bytes(), home.start()));
            self.homes.insert(home);
        }
        replaced
    }
}

#[cfg(test)]
mod tests {
    use transship_types::PAGE;

    use super::*;

    fn range(first: u64, last: u64) -> PageRange {
        PageRange::new(first * PAGE, last * PAGE).unwrap()
    }

    #[test]
    fn memory_that_moves_is_still_found_at_home() {
        let mut remaining = Remaining::new(&[range(0, 10), range(20, 30)].into_iter().collect());
        assert_eq!(remaining.remove(range(3, 4)), [range(3, 4)]);
        assert_eq!(remaining.shift(range(2, 8), range(22, 28)), [range(22, 28)]);
        assert_eq!(
            remaining.within(range(0, 40)),
            [
                (range(0, 2), range(0, 2)),
                (range(8, 10), range(8, 10)),
                (range(20, 22), range(20, 22)),
                (range(22, 23), range(2, 3)),
                (range(24, 28), range(4, 8)),
                (range(28, 30), range(28, 30)),
            ]
        );
        assert_eq!(remaining.from(23 * PAGE), Some(range(24, 28)));
        assert_eq!(remaining.from(25 * PAGE), Some(range(25, 28)));
        assert_eq!(remaining.from(30 * PAGE), None);
        let homes = [range(0, 3), range(4, 10), range(20, 22), range(28, 30)];
        assert_eq!(*remaining.homes(), homes.into_iter().collect());
        remaining.remove(range(0, 40));
        assert!(remaining.is_empty() && remaining.homes().is_empty());
    }
}
