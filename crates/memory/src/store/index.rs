//! Where the pages of one space lie.

use std::collections::BTreeMap;

use transship_types::{PAGE, PageRange, PageSet};

use super::slots::Run;

/// Where a stretch of pages lies: the first page of the arena, or nowhere,
/// as they are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Slot(usize),
    Zero,
}

impl Place {
    fn after(self, pages: usize) -> Self {
        match self {
            Place::Slot(slot) => Place::Slot(slot + pages),
            Place::Zero => Place::Zero,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Extent {
    end: u64,
    place: Place,
    round: u32,
}

/// By start address; extents do not overlap.
#[derive(Debug, Default)]
pub(super) struct Index(BTreeMap<u64, Extent>);

fn pages(bytes: u64) -> usize {
    (bytes / PAGE) as usize
}

impl Index {
    /// The parts of the range that are here.
    pub fn within(&self, range: PageRange) -> impl Iterator<Item = (PageRange, Place, u32)> + '_ {
        let before = self.0.range(..=range.start()).next_back().map_or(range.start(), |(s, _)| *s);
        self.0.range(before..range.end()).filter_map(move |(&start, extent)| {
            let part = PageRange::new(start, extent.end).ok()?.intersection(range)?;
            Some((part, extent.place.after(pages(part.start() - start)), extent.round))
        })
    }

    pub fn all(&self) -> impl Iterator<Item = (PageRange, u32)> + '_ {
        self.0.iter().filter_map(|(&start, extent)| {
            Some((PageRange::new(start, extent.end).ok()?, extent.round))
        })
    }

    /// How many entries it has.
    pub fn stretches(&self) -> usize {
        self.0.len()
    }

    pub fn absent(&self, range: PageRange) -> PageSet {
        let mut absent: PageSet = [range].into_iter().collect();
        for (part, ..) in self.within(range) {
            absent.remove(part);
        }
        absent
    }

    /// Takes the range out; answers what of the arena nobody needs any more.
    pub fn remove(&mut self, range: PageRange) -> Vec<Run> {
        let mut freed = Vec::new();
        let parts: Vec<_> = self.within(range).collect();
        for (part, place, round) in parts {
            if let Place::Slot(slot) = place {
                push_in_chunks(&mut freed, slot, pages(part.bytes()));
            }
            let Some((&start, &extent)) = self.0.range(..=part.start()).next_back() else {
                continue;
            };
            self.0.remove(&start);
            if start < part.start() {
                self.0.insert(start, Extent { end: part.start(), ..extent });
            }
            if part.end() < extent.end {
                let place = extent.place.after(pages(part.end() - start));
                self.0.insert(part.end(), Extent { end: extent.end, place, round });
            }
        }
        freed
    }

    /// Puts in a range of which nothing is here. What follows its neighbour
    /// in address, arena and round becomes one with it.
    pub fn insert(&mut self, range: PageRange, place: Place, round: u32) {
        if let Some((&start, before)) = self.0.range_mut(..range.start()).next_back()
            && before.end == range.start()
            && before.round == round
            && before.place.after(pages(range.start() - start)) == place
        {
            before.end = range.end();
        } else {
            self.0.insert(range.start(), Extent { end: range.end(), place, round });
        }
    }

    /// Says that the range, all of it here, was written in this round.
    pub fn refresh(&mut self, range: PageRange, round: u32) {
        let parts: Vec<_> = self.within(range).filter(|(.., of)| *of != round).collect();
        for (part, place, _) in parts {
            self.remove(part);
            self.insert(part, place, round);
        }
    }
}

/// Neighbours in the arena can lie in different chunks; a run does not.
fn push_in_chunks(runs: &mut Vec<Run>, mut slot: usize, mut pages: usize) {
    const CHUNK_PAGES: usize = crate::sys::arena::CHUNK / PAGE as usize;
    while pages > 0 {
        let here = pages.min(CHUNK_PAGES - slot % CHUNK_PAGES);
        runs.push(Run { slot, pages: here });
        slot += here;
        pages -= here;
    }
}
