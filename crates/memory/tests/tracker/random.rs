//! Random lives: at any time, whatever a program and its children did to
//! their memory, what was read is what they have.

use std::{io, time::Duration};

use transship_memory::Memory;

use crate::{store::Store, sys, target::Target};

const ROUNDS: u32 = 24;
const STEPS: u32 = 12;
/// Rounds after which everything is compared.
const COMPARE: u32 = 3;

#[test]
fn what_was_read_is_what_there_is() {
    for seed in [1, 7] {
        let mut target = Target::start();
        target.ask(&format!("live {seed}"));
        let tracker = target.tracker();
        let mut store = Store::default();
        let mut most = 0;
        for round in 1..=ROUNDS {
            target.ask(&format!("steps {STEPS}"));
            store.take(&tracker, &tracker.round().unwrap());
            if round % COMPARE != 0 {
                continue;
            }
            target.halt();
            store.check(&tracker);
            most = most.max(tracker.spaces().len());
            target.go_on();
        }
        assert!(most > 1, "no child ever lived with seed {seed}");
    }
}

/// xorshift64*: the same life for the same seed, except for its timing.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    /// Some pages of an area, in front of them `.0`, so many `.1`.
    fn part(&mut self, pages: usize) -> (usize, usize) {
        let first = self.below(pages as u64) as usize;
        (first, 1 + self.below((pages - first) as u64) as usize)
    }
}

#[derive(Clone, Copy)]
struct Area {
    at: usize,
    pages: usize,
    protection: i32,
}

/// A program that does nothing but change its memory.
pub struct Life {
    dice: Dice,
    areas: Vec<Area>,
    /// How many times its ancestors forked: the youngest have no children.
    depth: u32,
    children: u32,
}

const ALL: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

impl Life {
    pub fn new(seed: u64, depth: u32) -> Self {
        let dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Self { dice, areas: Vec::new(), depth, children: 0 }
    }

    /// By itself, with pauses, until it ends.
    pub fn run(mut self) -> ! {
        for _ in 0..100 + self.dice.below(400) {
            let _ = self.step();
            std::thread::sleep(Duration::from_micros(self.dice.below(2_000)));
        }
        std::process::exit(0);
    }

    /// Something. Much of it cannot be done, which is as good.
    pub fn step(&mut self) -> io::Result<()> {
        match self.dice.below(20) {
            0..=2 if self.areas.len() < 24 => self.map()?,
            3 => self.with_part(|_, part| {
                sys::unmap(part.at, part.pages)?;
                Ok(None)
            })?,
            4 => self.with_part(|dice, part| {
                let pages = part.pages + dice.below(16) as usize;
                Ok(Some(Area { at: sys::remap(part.at, part.pages, pages)?, pages, ..part }))
            })?,
            5 | 6 => self.with_part(|dice, part| {
                let protection = [libc::PROT_NONE, libc::PROT_READ, ALL][dice.below(3) as usize];
                sys::protect(part.at, part.pages, protection)?;
                Ok(Some(Area { protection, ..part }))
            })?,
            7 | 8 => self.with_part(|dice, part| {
                let advice = [
                    libc::MADV_DONTNEED,
                    libc::MADV_FREE,
                    libc::MADV_HUGEPAGE,
                    libc::MADV_COLLAPSE,
                    libc::MADV_PAGEOUT,
                ];
                let _ = sys::advise(part.at, part.pages, advice[dice.below(5) as usize]);
                Ok(Some(part))
            })?,
            9 => self.with_part(|_, part| {
                if part.protection != libc::PROT_NONE {
                    sys::look(part.at, part.pages);
                }
                Ok(Some(part))
            })?,
            10 => _ = crate::target::deep(self.dice.below(32)),
            11 => self.fork()?,
            12 if self.depth > 0 && self.dice.below(8) == 0 => {
                return Err(crate::target::live_again(self.dice.below(1 << 30), self.depth));
            }
            _ => self.with_part(|dice, part| {
                if part.protection == ALL {
                    sys::write(part.at, part.pages, dice.below(1 << 30));
                }
                Ok(Some(part))
            })?,
        }
        Ok(())
    }

    fn map(&mut self) -> io::Result<()> {
        let pages = 1 + self.dice.below(64) as usize;
        let at = match self.dice.below(8) {
            0 => {
                let file = tempfile::tempfile()?;
                // It may grow, and beyond the end of a file it may not.
                file.set_len(1 << 30)?;
                let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
                sys::map(pages, ALL, libc::MAP_PRIVATE, fd)?
            }
            1 => {
                let pages = 1024;
                let at = sys::map(pages, ALL, ANONYMOUS, -1)?;
                sys::advise(at, pages, libc::MADV_HUGEPAGE)?;
                self.areas.push(Area { at, pages, protection: ALL });
                return Ok(());
            }
            _ => sys::map(pages, ALL, ANONYMOUS, -1)?,
        };
        self.areas.push(Area { at, pages, protection: ALL });
        Ok(())
    }

    /// Does something to part of an area; what is left of it stays.
    fn with_part(
        &mut self,
        act: impl FnOnce(&mut Dice, Area) -> io::Result<Option<Area>>,
    ) -> io::Result<()> {
        if self.areas.is_empty() {
            return Ok(());
        }
        let index = self.dice.below(self.areas.len() as u64) as usize;
        let area = self.areas[index];
        let (first, pages) = self.dice.part(area.pages);
        let part = Area { at: area.at + first * sys::PAGE, pages, ..area };
        let after = act(&mut self.dice, part)?;
        if after.is_some_and(|after| after.at == part.at && after.protection == area.protection) {
            return Ok(());
        }
        self.areas.swap_remove(index);
        let behind = part.at + pages * sys::PAGE;
        let rest = area.pages - first - pages;
        let front = Area { pages: first, ..area };
        let back = Area { at: behind, pages: rest, ..area };
        self.areas.extend([front, back].into_iter().chain(after).filter(|area| area.pages > 0));
        Ok(())
    }

    fn fork(&mut self) -> io::Result<()> {
        self.children -= sys::collect_children().min(self.children);
        if self.depth > 1 || self.children > 1 {
            return Ok(());
        }
        let seed = self.dice.below(1 << 30);
        if sys::fork()?.is_some() {
            self.children += 1;
            return Ok(());
        }
        let areas = std::mem::take(&mut self.areas);
        Life { areas, ..Life::new(seed, self.depth + 1) }.run()
    }
}
