//! Whether fresh memory is had cheaper in huge pages or in small ones.
//!
//! A huge page usually costs a fifth of as many small ones. In a virtual
//! machine whose host takes free memory back it may cost many times as much:
//! what the host has taken are large blocks, and small pages still come from
//! what it has left. So it is measured and not guessed.

use std::time::Duration;

/// Of the pages of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grain {
    Small,
    Huge,
}

/// One chunk of so many is of the other grain, to learn how that goes now.
const EXPLORE: usize = 32;

/// What one measurement leaves of those before: some twenty of them count.
/// Of a huge page only the first write is dear, so that a few would not do.
const FADE: f64 = 0.95;

#[derive(Debug, Default)]
pub(super) struct Grains {
    /// By chunk, in the order in which they were opened.
    chunks: Vec<Grain>,
    small: Cost,
    huge: Cost,
}

/// What fresh memory has cost so far, older measurements faded.
#[derive(Debug, Default, Clone, Copy)]
struct Cost {
    seconds: f64,
    pages: f64,
}

impl Cost {
    fn add(&mut self, pages: usize, took: Duration) {
        self.seconds = self.seconds * FADE + took.as_secs_f64();
        self.pages = self.pages * FADE + pages as f64;
    }

    fn per_page(self) -> Option<f64> {
        (self.pages > 0.0).then(|| self.seconds / self.pages)
    }
}

impl Grains {
    /// For the next chunk, which is about to be opened.
    pub fn next(&mut self) -> Grain {
        let (cheaper, other) = match (self.huge.per_page(), self.small.per_page()) {
            (Some(huge), Some(small)) if small < huge => (Grain::Small, Grain::Huge),
            _ => (Grain::Huge, Grain::Small),
        };
        // The second chunk is the first of these.
        let grain = if self.chunks.len() % EXPLORE == 1 { other } else { cheaper };
        self.chunks.push(grain);
        grain
    }

    /// Writing so many pages of a chunk for the first time took so long.
    pub fn took(&mut self, chunk: usize, pages: usize, time: Duration) {
        match self.chunks.get(chunk) {
            Some(Grain::Small) => self.small.add(pages, time),
            Some(Grain::Huge) => self.huge.add(pages, time),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens and fills chunks, whose first pages cost so much; how many of
    /// them were huge.
    fn fill(grains: &mut Grains, chunks: usize, small_us: u64, huge_us: u64) -> usize {
        let mut huge = 0;
        for _ in 0..chunks {
            let (chunk, grain) = (grains.chunks.len(), grains.next());
            huge += usize::from(grain == Grain::Huge);
            for part in 0..4 {
                let whole = match grain {
                    Grain::Small => small_us / 4,
                    Grain::Huge if part == 0 => huge_us,
                    Grain::Huge => 1,
                };
                grains.took(chunk, 128, Duration::from_micros(whole));
            }
        }
        huge
    }

    #[test]
    fn the_cheaper_one_is_taken_and_the_other_tried() {
        for (small_us, huge_us, least, most) in [(500, 100, 120, 124), (800, 6000, 4, 8)] {
            let huge = fill(&mut Grains::default(), 128, small_us, huge_us);
            assert!((least..=most).contains(&huge), "{huge} of 128 at {small_us}, {huge_us}");
        }
    }

    #[test]
    fn what_becomes_cheaper_is_noticed() {
        let mut grains = Grains::default();
        fill(&mut grains, 64, 500, 100);
        let huge = fill(&mut grains, 256, 500, 6000);
        assert!(huge < 32, "{huge} of 256 are huge");
        let huge = fill(&mut grains, 1024, 5000, 100);
        assert!(huge > 640, "{huge} of 1024 are huge");
    }

    #[test]
    fn of_a_chunk_that_nobody_opened_nothing_is_learnt() {
        let mut grains = Grains::default();
        grains.took(7, 1, Duration::from_secs(1));
        assert_eq!(grains.next(), Grain::Huge);
        assert_eq!(grains.next(), Grain::Small);
    }
}
