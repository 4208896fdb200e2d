//! Which pages of the arena are taken.

use std::collections::BTreeSet;

use transship_types::PAGE;

use crate::sys::arena::CHUNK;

/// Pages of a chunk.
const PAGES: usize = CHUNK / PAGE as usize;

/// Pages of the arena that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub slot: usize,
    pub pages: usize,
}

impl Run {
    /// The one it lies in.
    pub fn chunk(&self) -> usize {
        self.slot / PAGES
    }
}

/// A free page is taken from the first chunk that has one, so that chunks
/// stay full or become empty, and an empty one can be given back.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// By chunk: one bit for each page, set if it is taken.
    taken: Vec<[u64; PAGES / 64]>,
    /// Chunks with a free page, and not being given back.
    free: BTreeSet<usize>,
    used: usize,
}

impl Slots {
    pub fn used(&self) -> usize {
        self.used
    }

    /// Takes so many pages in as few runs as there are, opening chunks up to
    /// `chunks`; `None`, and nothing taken, if that is not enough.
    pub fn take(&mut self, mut pages: usize, chunks: usize) -> Option<Vec<Run>> {
        let mut runs = Vec::new();
        while pages > 0 {
            let chunk = match self.free.first() {
                Some(chunk) => *chunk,
                None if self.taken.len() < chunks => {
                    self.taken.push([0; PAGES / 64]);
                    self.free.insert(self.taken.len() - 1);
                    self.taken.len() - 1
                }
                None => {
                    self.give(&runs);
                    return None;
                }
            };
            let Some(run) = self.first_free(chunk, pages) else {
                self.free.remove(&chunk);
                continue;
            };
            self.mark(run, true);
            pages -= run.pages;
            runs.push(run);
        }
        Some(runs)
    }

    /// Answers the chunks in which nothing is left: they are nobody's until
    /// `given_back`.
    pub fn give(&mut self, runs: &[Run]) -> Vec<usize> {
        let mut empty = Vec::new();
        for run in runs {
            self.mark(*run, false);
            let chunk = run.chunk();
            if self.taken[chunk] == [0; PAGES / 64] {
                self.free.remove(&chunk);
                empty.push(chunk);
            } else {
                self.free.insert(chunk);
            }
        }
        empty
    }

    pub fn given_back(&mut self, chunk: usize) {
        self.free.insert(chunk);
    }

    fn first_free(&self, chunk: usize, limit: usize) -> Option<Run> {
        let taken = &self.taken[chunk];
        let is_free = |page: usize| taken[page / 64] >> (page % 64) & 1 == 0;
        let word = taken.iter().position(|word| *word != u64::MAX)?;
        let first = word * 64 + taken[word].trailing_ones() as usize;
        let pages = (first..PAGES).take(limit).take_while(|page| is_free(*page)).count();
        Some(Run { slot: chunk * PAGES + first, pages })
    }

    /// `run` lies in one chunk.
    fn mark(&mut self, run: Run, taken: bool) {
        let chunk = &mut self.taken[run.chunk()];
        for page in run.slot % PAGES..run.slot % PAGES + run.pages {
            let bit = 1 << (page % 64);
            assert_eq!(chunk[page / 64] & bit == 0, taken, "page {page} of {run:?}");
            chunk[page / 64] ^= bit;
        }
        if taken {
            self.used += run.pages;
        } else {
            self.used -= run.pages;
        }
    }
}
