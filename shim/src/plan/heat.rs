//! Which pages are written again and again.

use std::collections::{BTreeMap, HashMap};

use transship_memory::Dirty;
use transship_types::{PAGE, PageSet, Space};

/// Pages that are counted one by one. Of more memory (from 1 GiB on) every
/// so-manieth is: a count of each would take a good part of it.
const COUNTED: u64 = 1 << 18;

pub struct Heat {
    /// A prime number, so that no stride of a program hides from it.
    step: u64,
    counts: HashMap<(Space, u64), usize>,
    written: BTreeMap<Space, PageSet>,
}

impl Heat {
    pub fn new(pages: u64) -> Self {
        let step = (pages.div_ceil(COUNTED).max(1)..).find(|n| is_prime(*n)).unwrap_or(1);
        Self { step, counts: HashMap::new(), written: BTreeMap::new() }
    }

    /// What was written in one more interval.
    pub fn add(&mut self, written: &Dirty) {
        for (space, pages) in &written.spaces {
            let all = self.written.entry(*space).or_default();
            for range in pages.iter() {
                all.insert(range);
                let (first, end) = (range.start() / PAGE, range.end() / PAGE);
                let mut page = first.next_multiple_of(self.step);
                while page < end {
                    *self.counts.entry((*space, page)).or_default() += 1;
                    page += self.step;
                }
            }
        }
    }

    /// Pages that were written at all.
    pub fn written(&self) -> u64 {
        self.written.values().map(PageSet::pages).sum()
    }

    /// Pages that were written in more than half of the intervals.
    pub fn hot(&self, intervals: usize) -> u64 {
        let hot = self.counts.values().filter(|count| **count * 2 > intervals).count();
        hot as u64 * self.step
    }
}

/// 1 counts as one here: every page.
fn is_prime(n: u64) -> bool {
    (2..n).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

#[cfg(test)]
mod tests {
    use transship_types::PageRange;

    use super::*;

    fn dirty(ranges: &[(u64, u64)]) -> Dirty {
        let mut set = PageSet::new();
        for (from, pages) in ranges {
            set.insert(PageRange::of_pages(from * PAGE, *pages).unwrap());
        }
        Dirty { spaces: vec![(Space::Process(1), set)] }
    }

    #[test]
    fn hot_is_what_most_intervals_write() {
        let mut heat = Heat::new(1000);
        heat.add(&dirty(&[(0, 10), (100, 5)]));
        heat.add(&dirty(&[(0, 10), (200, 5)]));
        heat.add(&dirty(&[(5, 10)]));
        assert_eq!((heat.written(), heat.hot(3)), (25, 10));
        heat.add(&dirty(&[]));
        // Half of the intervals is not more than half.
        assert_eq!(heat.hot(4), 5);
        assert_eq!(Heat::new(0).hot(0), 0);
    }

    #[test]
    fn of_much_memory_a_part_is_counted() {
        let mut heat = Heat::new(10 << 18);
        assert_eq!(heat.step, 11);
        heat.add(&dirty(&[(3, 110_000)]));
        assert_eq!((heat.written(), heat.hot(1)), (110_000, 110_000));
        // Ranges shorter than a step count in proportion.
        let mut heat = Heat::new(10 << 18);
        let scattered: Vec<_> = (0..11_000).map(|n| (n * 3, 1)).collect();
        heat.add(&dirty(&scattered));
        assert_eq!(heat.hot(1), 11_000);
    }
}
