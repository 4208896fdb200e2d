//! The flags of a process's mappings, without a walk over its pages.
//!
//! The kernel tells them in one file only, `/proc/PID/smaps`, beside figures
//! for which it looks at every page. So a program of a few instructions is run
//! by the kernel over the mappings (a BPF iterator), and writes down where
//! each begins and ends and the word its flags are in:
//!
//! ```text
//! new():  /sys/kernel/btf/vmlinux ─▶ where the fields are ─▶ program, checked
//!         samples of our own: its flags == those in /proc/self/smaps?
//! of():   run it over one process                   (some 10 µs, in the pause)
//! ```
//!
//! Which bit means what is the kernel's own affair, and has been the same for
//! as long as there is such a program. All the same it is tried on mappings of
//! our own first, one for each flag, and not used where it differs.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
};

use nix::libc;

use super::{btf::Btf, smaps};
use crate::sys::{self, Sample, Wish};

/// The names in smaps of all flags that CRIU knows (`parse_vmflags` in
/// criu/proc_parse.c of 4.1 and 4.2), with their bits in the kernel
/// (include/linux/mm.h). Without shadow stacks ("ss"), whose bit differs from
/// one processor to another: see [`OTHERS`].
const FLAGS: [(&str, u32); 15] = [
    ("gd", 8),
    ("pf", 10),
    ("lo", 13),
    ("io", 14),
    ("sr", 15),
    ("rr", 16),
    ("dc", 17),
    ("nr", 21),
    ("ht", 22),
    ("wf", 25),
    ("dd", 26),
    ("hg", 29),
    ("nh", 30),
    ("mg", 31),
    ("dp", 40),
];

/// Bits that CRIU does not ask for, if they are not among [`FLAGS`]: the lower
/// half, which is full and has no others that it knows, and what processors
/// use for protection keys and memory tags. Above them bits have moved, and
/// may be anything, such as a shadow stack.
const OTHERS: u64 = (1 << 37) - 1;

/// A mapping for each of [`FLAGS`] that a program can wish for. But for "mg":
/// the kernel would look through us for equal pages from then on.
const SAMPLES: [Wish; 12] = [
    mapped(libc::MAP_PRIVATE | libc::MAP_GROWSDOWN),
    mapped(libc::MAP_PRIVATE | libc::MAP_LOCKED),
    mapped(libc::MAP_PRIVATE | libc::MAP_NORESERVE),
    mapped(libc::MAP_PRIVATE | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB | libc::MAP_NORESERVE),
    mapped(libc::MAP_DROPPABLE),
    advised(libc::MADV_SEQUENTIAL),
    advised(libc::MADV_RANDOM),
    advised(libc::MADV_DONTFORK),
    advised(libc::MADV_WIPEONFORK),
    advised(libc::MADV_DONTDUMP),
    advised(libc::MADV_HUGEPAGE),
    advised(libc::MADV_NOHUGEPAGE),
];

const fn mapped(flags: libc::c_int) -> Wish {
    Wish { flags, advice: None }
}

const fn advised(advice: libc::c_int) -> Wish {
    Wish { flags: libc::MAP_PRIVATE, advice: Some(advice) }
}

/// A mapping, as the kernel's program tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flagged {
    pub start: u64,
    pub end: u64,
    pub word: u64,
}

impl Flagged {
    /// The names of its flags as far as CRIU knows them; `None` if it may
    /// have one whose bit we do not know.
    pub fn names(self) -> Option<impl Iterator<Item = &'static str>> {
        let word = self.word;
        let known = FLAGS.iter().fold(OTHERS, |known, (_, bit)| known | 1 << bit);
        let set = FLAGS.iter().filter(move |(_, bit)| word >> bit & 1 == 1);
        (word & !known == 0).then(|| set.map(|(name, _)| *name))
    }
}

/// The kernel's program, tried.
pub struct Flags(OwnedFd);

impl Flags {
    /// Takes some milliseconds. The error says why this kernel cannot.
    pub fn new() -> io::Result<Self> {
        let types = fs::read("/sys/kernel/btf/vmlinux")?;
        let btf = Btf::parse(&types)?;
        let iterator = btf.function("bpf_iter_task_vma");
        let place = |field| btf.offset("vm_area_struct", field);
        let places = (place("vm_start"), place("vm_end"), place("vm_flags"));
        let (Some(iterator), (Some(start), Some(end), Some(flags))) = (iterator, places) else {
            return Err(io::Error::other("this kernel has no iterator over mappings"));
        };
        // The kernel lends its own functions to nobody but the GPL; these
        // instructions, and they alone, may be used under it as well.
        let license = c"Dual MIT/GPL";
        let program = program([start, end, flags]);
        let flags = Self(sys::load_iterator(&program, iterator, license)?);
        flags.try_out()?;
        Ok(flags)
    }

    /// The mappings of a process in order, without the kernel's own page for
    /// all (vsyscall). None of one that is gone.
    pub fn of(&self, pid: i32) -> io::Result<Vec<Flagged>> {
        let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
        let mut mappings: Vec<Flagged> = Vec::new();
        sys::iterate(self.0.as_fd(), pid, |written| {
            for entry in written.chunks_exact(ENTRY) {
                let (start, end) = (word(&entry[..8]), word(&entry[8..16]));
                if mappings.last().is_some_and(|last| start < last.end) {
                    return false;
                }
                mappings.push(Flagged { start, end, word: word(&entry[16..]) });
            }
            true
        })?;
        Ok(mappings)
    }

    /// Whether samples of ours have the flags that the kernel tells of them,
    /// and its own pages ("io", "pf") too.
    fn try_out(&self) -> io::Result<()> {
        let wished = SAMPLES.iter().filter_map(|wish| Sample::map(*wish));
        let samples: Vec<Sample> = wished.collect();
        let told = fs::read("/proc/self/smaps")?;
        let found = self.of(std::process::id() as i32)?;
        for (header, told) in smaps::entries(&told) {
            let sample = samples.iter().any(|sample| sample.start() == header.start);
            if !sample && !header.name.starts_with(b"[vvar") {
                continue;
            }
            let own = found.iter().find(|own| (own.start, own.end) == (header.start, header.end));
            let own: Option<Vec<&str>> = own.and_then(|own| Some(own.names()?.collect()));
            let told = told.iter().filter(|name| FLAGS.iter().any(|(known, _)| known == *name));
            if own.as_deref().is_none_or(|own| !same(own, told.copied())) {
                let text = format!("a mapping's flags are not where they should be: {own:?}");
                return Err(io::Error::other(text));
            }
        }
        Ok(())
    }
}

fn same<'a>(own: &[&str], told: impl Iterator<Item = &'a str>) -> bool {
    let mut told: Vec<&str> = told.collect();
    let mut own = own.to_vec();
    own.sort_unstable();
    told.sort_unstable();
    own == told
}

/// Bytes that the program writes of each mapping: three words.
const ENTRY: usize = 24;

/// Registers of the kernel's machine (Documentation/bpf/standardization).
mod register {
    pub const R0: u64 = 0;
    pub const R1: u64 = 1;
    pub const R2: u64 = 2;
    pub const R3: u64 = 3;
    /// Survives a call.
    pub const R6: u64 = 6;
    pub const R7: u64 = 7;
    /// The end of the stack.
    pub const R10: u64 = 10;
}

/// Writes the three fields of one mapping, or nothing where there is none:
/// the kernel runs it once more at the end.
///
/// Its argument, `struct bpf_iter__task_vma`, has three pointers: to `struct
/// bpf_iter_meta`, which begins with one to the open file, to the task, and
/// to the mapping. Their order is part of the kernel's promises.
fn program(fields: [u16; 3]) -> Vec<u64> {
    use register::*;
    const SEQ_WRITE: u32 = 127;
    let mut code = vec![
        instruction(op::MOVE, R6, R1, 0, 0),
        instruction(op::LOAD, R7, R6, 16, 0),
        instruction(op::JUMP_IF_ZERO, R7, 0, 12, 0),
    ];
    for (index, field) in fields.into_iter().enumerate() {
        code.push(instruction(op::LOAD, R1, R7, field as i16, 0));
        code.push(instruction(op::STORE, R10, R1, index as i16 * 8 - ENTRY as i16, 0));
    }
    code.extend([
        instruction(op::LOAD, R1, R6, 0, 0),
        instruction(op::LOAD, R1, R1, 0, 0),
        instruction(op::MOVE, R2, R10, 0, 0),
        instruction(op::ADD_CONSTANT, R2, 0, 0, -(ENTRY as i32)),
        instruction(op::MOVE_CONSTANT, R3, 0, 0, ENTRY as i32),
        instruction(op::CALL, 0, 0, 0, SEQ_WRITE as i32),
        instruction(op::MOVE_CONSTANT, R0, 0, 0, 0),
        instruction(op::EXIT, 0, 0, 0, 0),
    ]);
    code
}

mod op {
    pub const MOVE: u64 = 0xbf;
    pub const MOVE_CONSTANT: u64 = 0xb7;
    pub const ADD_CONSTANT: u64 = 0x07;
    pub const LOAD: u64 = 0x79;
    pub const STORE: u64 = 0x7b;
    pub const JUMP_IF_ZERO: u64 = 0x15;
    pub const CALL: u64 = 0x85;
    pub const EXIT: u64 = 0x95;
}

/// `struct bpf_insn`: code, destination and source, offset, constant.
fn instruction(code: u64, to: u64, from: u64, offset: i16, constant: i32) -> u64 {
    let [low, high] = offset.to_ne_bytes();
    let bytes = [code as u8, (from << 4 | to) as u8, low, high];
    let [a, b, c, d] = constant.to_ne_bytes();
    u64::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3], a, b, c, d])
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        env,
        io::{BufRead, BufReader, Write},
        process::{Child, Command, Stdio},
    };

    use super::*;

    /// A kernel without such programs has nothing to test; it is said.
    fn flags() -> Option<Flags> {
        let flags = Flags::new();
        if let Err(error) = &flags {
            eprintln!("note: CRIU reads smaps on this kernel: {error}");
        }
        flags.ok()
    }

    /// This program once more, as [`acts_as_a_process_with_mappings`].
    struct Mapper(Child);

    impl Mapper {
        fn start(seed: u64) -> Self {
            let mut command = Command::new(env::current_exe().unwrap());
            let test = "hide::flags::tests::acts_as_a_process_with_mappings";
            command.args(["--exact", test, "--ignored", "--nocapture"]);
            command.env("SEED", seed.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
            Self(command.spawn().unwrap())
        }

        fn map_more(&mut self) {
            self.0.stdin.as_mut().unwrap().write_all(b"more\n").unwrap();
            let mut lines = BufReader::with_capacity(1, self.0.stdout.as_mut().unwrap()).lines();
            assert!(lines.any(|line| line.unwrap() == "mapped"), "it ended");
        }

        fn pid(&self) -> i32 {
            self.0.id() as i32
        }
    }

    impl Drop for Mapper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    #[ignore = "the process that another test looks at"]
    fn acts_as_a_process_with_mappings() {
        let mut random: u64 = env::var("SEED").unwrap().parse().unwrap();
        let mut below = |limit: usize| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) as usize % limit
        };
        let mut samples = Vec::new();
        for _ in io::stdin().lines() {
            samples.retain(|_| below(4) > 0);
            for _ in 0..1500 {
                let (flags, advice) = (SAMPLES[below(5)].flags, SAMPLES[5 + below(7)].advice);
                let flags = if below(2) == 0 { libc::MAP_PRIVATE } else { flags };
                let advice = advice.filter(|_| below(3) > 0);
                samples.extend(Sample::map(Wish { flags, advice }));
            }
            println!("mapped");
        }
    }

    /// Heads of mappings and what CRIU makes of their flags, in its own way.
    fn as_criu_reads(smaps: &[u8]) -> Vec<(String, BTreeSet<String>)> {
        let known = [
            "gd", "lo", "nr", "ht", "dp", "sr", "rr", "dc", "dd", "mg", "hg", "nh", "wf", "io",
            "pf", "ss",
        ];
        let hexadecimal = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
        let is_head = |line: &str| {
            let mut bytes = line.as_bytes().iter().skip_while(|byte| hexadecimal(byte));
            let dash = bytes.next() == Some(&b'-');
            dash && bytes.find(|byte| !hexadecimal(byte)) == Some(&b' ')
        };
        let mut mappings: Vec<(String, BTreeSet<String>)> = Vec::new();
        for line in String::from_utf8_lossy(smaps).lines() {
            if let Some(flags) = line.strip_prefix("VmFlags: ") {
                let (_, of_it) = mappings.last_mut().unwrap();
                of_it.extend(flags.split(' ').filter(|flag| known.contains(flag)).map(Into::into));
            } else if is_head(line) {
                mappings.push((line.to_owned(), BTreeSet::new()));
            }
        }
        mappings
    }

    #[test]
    fn criu_reads_the_same_as_in_smaps() {
        let Some(flags) = flags() else { return };
        for seed in [1, 2, 3] {
            let mut mapper = Mapper::start(seed);
            for _ in 0..2 {
                mapper.map_more();
                let maps = fs::read(format!("/proc/{}/maps", mapper.pid())).unwrap();
                let found = flags.of(mapper.pid()).unwrap();
                assert!(found.len() * ENTRY > 1 << 15, "all of it is in one buffer");
                let joined = smaps::join(&maps, &found).unwrap();
                let told = fs::read(format!("/proc/{}/smaps", mapper.pid())).unwrap();
                let (joined, told) = (as_criu_reads(&joined), as_criu_reads(&told));
                let seen: BTreeSet<_> = told.iter().flat_map(|(_, flags)| flags.clone()).collect();
                assert!(seen.len() > 7, "{seen:?}");
                assert_eq!(joined.len(), told.len());
                for (ours, kernels) in joined.iter().zip(&told) {
                    assert_eq!(ours, kernels, "seed {seed}");
                }
            }
        }
    }

    #[test]
    fn flags_elsewhere_are_noticed() {
        let Some(_) = flags() else { return };
        let types = fs::read("/sys/kernel/btf/vmlinux").unwrap();
        let btf = Btf::parse(&types).unwrap();
        let iterator = btf.function("bpf_iter_task_vma").unwrap();
        let place = |field| btf.offset("vm_area_struct", field).unwrap();
        let program = program([place("vm_start"), place("vm_end"), place("vm_pgoff")]);
        let flags = sys::load_iterator(&program, iterator, c"Dual MIT/GPL").unwrap();
        assert!(Flags(flags).try_out().is_err());
    }

    #[test]
    fn a_process_that_is_gone_has_none() {
        let Some(flags) = flags() else { return };
        assert_eq!(flags.of(i32::MAX).unwrap(), []);
    }

    #[test]
    fn a_bit_that_may_be_anything_is_no_flag() {
        let names = |word| {
            let names = Flagged { start: 0, end: 1, word }.names()?;
            Some(names.collect::<Vec<_>>())
        };
        assert_eq!(names(1 << 13 | 1 << 26 | 7), Some(vec!["lo", "dd"]));
        assert_eq!(names(1 << 40), Some(vec!["dp"]));
        assert_eq!(names(1 << 33), Some(vec![]), "a protection key");
        assert_eq!(names(1 << 38 | 1 << 13), None);
    }
}
