//! The process that is moved: memory of every kind, and nothing open.

use std::{fs, path::Path, process, thread};

use nix::libc;

use crate::sys;

pub const ANONYMOUS: usize = 16 << 20;
pub const FILE: usize = 1 << 20;
pub const LOCKED: usize = 1 << 20;
pub const SHARED: usize = 1 << 20;
/// Mappings that differ by what the kernel does with them.
const REMARKABLE: [sys::Kind<'_>; 9] = [
    sys::Kind::Advised(libc::MADV_DONTFORK),
    sys::Kind::Advised(libc::MADV_WIPEONFORK),
    sys::Kind::Advised(libc::MADV_DONTDUMP),
    sys::Kind::Advised(libc::MADV_HUGEPAGE),
    sys::Kind::Advised(libc::MADV_NOHUGEPAGE),
    sys::Kind::Advised(libc::MADV_SEQUENTIAL),
    sys::Kind::Advised(libc::MADV_RANDOM),
    sys::Kind::Flagged(libc::MAP_GROWSDOWN),
    sys::Kind::Flagged(libc::MAP_NORESERVE),
];
const PAGE: usize = 4096;
const ON_STACKS: usize = 256 << 10;

pub fn run(dir: &Path) -> ! {
    nix::unistd::setsid().expect("a session");
    sys::block_the_asking_signal();
    let anonymous = sys::map(ANONYMOUS, sys::Kind::Anonymous);
    let locked = sys::map(LOCKED, sys::Kind::Locked);
    let shared = sys::map(SHARED, sys::Kind::Shared);
    let closed = sys::map(FILE, sys::Kind::Anonymous);
    let path = dir.join("mapped");
    fs::write(&path, vec![3; FILE]).expect("a file");
    let file = sys::map(FILE, sys::Kind::File(&path));
    fill(anonymous, 1, 1);
    fill(locked, 2, 1);
    fill(shared, 4, 1);
    fill(closed, 5, 3);
    fill(file, 6, 2);
    let remarkable = REMARKABLE.map(|kind| sys::map(8 * PAGE, kind));
    sys::guard(&mut anonymous[8 * PAGE..12 * PAGE]);
    let child = sys::fork();
    if child == 0 {
        // Half of it becomes its own; the rest it shares until somebody writes.
        fill(&mut anonymous[ANONYMOUS / 2..], 7, 1);
        fill(file, 8, 2);
    }
    if child != 0 {
        // A child has not all of them, and not what is in them.
        remarkable.into_iter().for_each(|memory| fill(memory, 9, 2));
    }
    sys::lock_and_close(locked, closed);
    let threads: Vec<_> = (0..3).map(|number| thread::spawn(move || hold(number))).collect();
    sys::close_everything();
    let own = process::id();
    if child != 0 {
        write_whole(&dir.join("child"), child.to_string());
    }
    write_whole(&dir.join(format!("ready-{own}")), String::new());
    loop {
        sys::wait_to_be_asked();
        let mut sum = Sum(0xcbf2_9ce4_8422_2325);
        sum.add(&anonymous[..8 * PAGE]);
        sum.add(&anonymous[12 * PAGE..]);
        sum.add(file);
        sum.add(locked);
        sum.add(shared);
        sys::with_access(closed, |closed| sum.add(closed));
        for thread in &threads {
            thread.thread().unpark();
        }
        let text = format!("{:x} {:x}", sum.0, sys::STACKS.iter().fold(0, sys::ask_stack));
        write_whole(&dir.join(format!("sum-{own}")), text);
    }
}

/// A thread whose stack has something on it.
fn hold(number: usize) -> ! {
    let mut array = [0_u8; ON_STACKS];
    fill(&mut array, number as u8 + 20, 1);
    loop {
        thread::park();
        let mut sum = Sum(0);
        sum.add(std::hint::black_box(&array));
        sys::answer_for_stack(number, sum.0);
    }
}

/// Writes each `every`th page.
fn fill(memory: &mut [u8], seed: u8, every: usize) {
    for (index, page) in memory.chunks_mut(PAGE).enumerate().step_by(every) {
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = seed.wrapping_mul(31) ^ (index as u8) ^ (at as u8) ^ (index >> 8) as u8;
        }
    }
}

/// Nobody reads half of it.
fn write_whole(path: &Path, text: String) {
    let fresh = path.with_extension("new");
    fs::write(&fresh, text).expect("writing");
    fs::rename(fresh, path).expect("renaming");
}

struct Sum(u64);

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}
