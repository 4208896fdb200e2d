//! A userfaultfd for the memory of another process, made inside it.
//!
//! Nobody can make one for a foreign address space. So one thread of the
//! process is stopped for a fraction of a millisecond, makes two system calls
//! for us (userfaultfd, close) with the instruction that the kernel's vdso
//! has in every process, and goes on as if nothing had been; in between we
//! take a copy of the descriptor.
//!
//! ```text
//! running ──seize, interrupt──▶ trapped ──registers changed──▶ entry ─▶ exit ─┐
//!    ▲                             │ ▲                                        │
//!    └────────── detach ───────────┘ └──── userfaultfd, then close ───────────┘
//! ```
//!
//! Whatever fails, registers and signal mask are put back and the thread is
//! let go. It happens on a thread of ours that ends right after: the kernel
//! detaches what a thread leaves behind, also one that would not stop.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use crate::{
    maps,
    spaces::Process,
    stop::{Refused, detach, seize, system, threads, trap, wait},
    sys::{
        self,
        ptrace::{self, Registers, Stop},
    },
};

/// Closed if the process executes another program, never waited on, and not
/// for faults of the kernel: those would need a privilege that the process may
/// not have, and an asynchronous one handles them itself.
const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
/// UFFD_USER_MODE_ONLY of `linux/userfaultfd.h`.
const USER_MODE_ONLY: i32 = 1;
/// How long one of our system calls inside may take before the thread is
/// interrupted again. They never block; only a cgroup that freezes meanwhile
/// holds them up.
const CALL_WITHIN: Duration = Duration::from_secs(1);
/// Times this is tried for the call that takes our descriptor away.
const CLOSE_ATTEMPTS: usize = 5;
/// Threads that are asked before the process counts as one that won't stop.
const THREADS: usize = 3;
/// Times a thread is let go and stopped again because it was in the middle of
/// a restartable sequence. Those last nanoseconds.
const SEQUENCES: usize = 20;

/// A descriptor that was taken, and how long the process stood still for it.
pub(crate) struct Taken {
    pub uffd: OwnedFd,
    pub stopped: Duration,
}

/// Makes a userfaultfd for the memory of `process`.
pub(crate) fn userfaultfd_of(process: &Process) -> Result<Taken, Refused> {
    if !arch::SUPPORTED {
        return Err(Refused::Unsupported("not available on this architecture"));
    }
    let code = Code::find(process.pid)?;
    let mut last = Refused::Busy;
    for (tid, patience) in threads(process.pid, THREADS)?.into_iter().take(THREADS) {
        let attempt = || in_thread(process, tid, patience, &code);
        last = match thread::scope(|scope| scope.spawn(attempt).join()) {
            Ok(Err(busy @ (Refused::Busy | Refused::Gone))) => busy,
            Ok(done) => return done,
            Err(panic) => std::panic::resume_unwind(panic),
        };
    }
    Err(last)
}

fn in_thread(
    process: &Process,
    tid: i32,
    patience: Duration,
    code: &Code,
) -> Result<Taken, Refused> {
    let seized = Seized::stop(tid, patience, code)?;
    let number = seized.call(libc::SYS_userfaultfd, [FLAGS as u64, 0, 0])?;
    // Negative numbers are errors, as everywhere below the C library.
    if number < 0 {
        return Err(Refused::Call(io::Error::from_raw_os_error(-number as i32)));
    }
    let number = number as i32;
    let taken = sys::process::take_descriptor(process.handle.as_fd(), number);
    seized.close(number)?;
    let stopped = seized.release();
    let uffd = taken.map_err(system("taking the userfaultfd out of it"))?;
    Ok(Taken { uffd, stopped })
}

/// Where the process has an instruction that makes a system call.
struct Code {
    pid: i32,
    vdso: u64,
    call: u64,
}

/// What an ELF file begins with, and so the vdso.
const ELF: [u8; 4] = *b"\x7fELF";

impl Code {
    fn find(pid: i32) -> Result<Self, Refused> {
        let vdso = maps::vdso(pid).map_err(system("reading its maps"))?;
        let vdso = vdso.ok_or(Refused::Unsupported("it has no vdso"))?;
        let mut bytes = vec![0; vdso.bytes() as usize];
        let read = sys::process::read(pid, &[(vdso.start(), bytes.len())], &mut bytes);
        let read = read.map_err(system("reading its vdso"))?;
        let at = bytes[..read].windows(arch::CALL.len()).position(|window| window == arch::CALL);
        let at = at.ok_or(Refused::Unsupported("its vdso makes no system calls"))?;
        Ok(Self { pid, vdso: vdso.start(), call: vdso.start() + at as u64 })
    }

    /// Whether it is still there: the process may have executed another
    /// program since.
    fn holds(&self) -> bool {
        let mut bytes = [0; ELF.len() + arch::CALL.len()];
        let ranges = [(self.vdso, ELF.len()), (self.call, arch::CALL.len())];
        let read = sys::process::read(self.pid, &ranges, &mut bytes);
        read.is_ok_and(|read| read == bytes.len())
            && bytes[..ELF.len()] == ELF
            && bytes[ELF.len()..] == arch::CALL
    }
}

/// A thread that stands still and shall go on as it was: dropping it puts
/// everything back.
struct Seized<'a> {
    tid: i32,
    code: &'a Code,
    saved: Registers,
    mask: u64,
    since: Instant,
}

impl<'a> Seized<'a> {
    fn stop(tid: i32, patience: Duration, code: &'a Code) -> Result<Self, Refused> {
        seize(code.pid, tid)?;
        let since = Instant::now();
        for _ in 0..SEQUENCES {
            trap(code.pid, tid, patience)?;
            let saved = ptrace::registers(tid).map_err(|error| match error.kind() {
                io::ErrorKind::Unsupported => Refused::Unsupported("it is a 32-bit program"),
                _ => Refused::Untraceable(error),
            })?;
            if !arch::is_native(&saved) {
                detach(tid);
                return Err(Refused::Unsupported("it is a 32-bit program"));
            }
            if in_sequence(code.pid, tid, arch::instruction(&saved)) {
                ptrace::resume(tid, 0).map_err(Refused::Untraceable)?;
                continue;
            }
            if !code.holds() {
                detach(tid);
                return Err(Refused::Busy);
            }
            let mask = ptrace::signal_mask(tid).map_err(Refused::Untraceable)?;
            let seized = Self { tid, code, saved, mask, since };
            // No handler may run on our registers.
            ptrace::set_signal_mask(tid, u64::MAX).map_err(Refused::Untraceable)?;
            return Ok(seized);
        }
        Err(Refused::Busy)
    }

    /// Has the thread make a system call; answers what the kernel answered.
    fn call(&self, number: libc::c_long, arguments: [u64; 3]) -> Result<i64, Refused> {
        let mut registers = self.saved;
        arch::set_call(&mut registers, self.code.call, number, arguments);
        ptrace::set_registers(self.tid, &registers).map_err(Refused::Untraceable)?;
        // Once on the way in, once on the way out.
        for _ in 0..2 {
            self.to_system_call()?;
        }
        let registers = ptrace::registers(self.tid).map_err(Refused::Untraceable)?;
        Ok(arch::result(&registers))
    }

    /// Takes a descriptor away again. A cgroup that is freezing may be in the
    /// way for a moment.
    fn close(&self, number: i32) -> Result<(), Refused> {
        let mut outcome = Err(Refused::Busy);
        for _ in 0..CLOSE_ATTEMPTS {
            outcome = self.call(libc::SYS_close, [number as u64, 0, 0]).map(drop);
            if !matches!(outcome, Err(Refused::Busy)) {
                break;
            }
        }
        outcome
    }

    fn to_system_call(&self) -> Result<(), Refused> {
        let mut signal = 0;
        loop {
            ptrace::resume_to_system_call(self.tid, signal).map_err(Refused::Untraceable)?;
            match wait(self.code.pid, self.tid, CALL_WITHIN)? {
                Some(Stop::SystemCall) => return Ok(()),
                // All signals are blocked but SIGSTOP; it takes effect when
                // the thread is let go.
                Some(Stop::Signal(stop)) => signal = stop,
                Some(Stop::Trap) => signal = 0,
                None => {
                    // It must stand still for its registers to be put back.
                    trap(self.code.pid, self.tid, Duration::MAX)?;
                    return Err(Refused::Busy);
                }
            }
        }
    }

    fn release(self) -> Duration {
        let since = self.since;
        drop(self);
        since.elapsed()
    }
}

impl Drop for Seized<'_> {
    fn drop(&mut self) {
        let restored = ptrace::set_registers(self.tid, &self.saved)
            .and_then(|()| ptrace::set_signal_mask(self.tid, self.mask))
            .and_then(|()| ptrace::detach(self.tid));
        match restored {
            Err(error) if !maps::gone(&error) => {
                tracing::error!(tid = self.tid, %error, "a thread could not be put back as it was");
            }
            _ => {}
        }
    }
}

/// Whether the thread is within a restartable sequence (rseq(2)). The kernel
/// sends it back to its beginning when it has been interrupted, and would
/// forget to after it has run our instructions.
fn in_sequence(pid: i32, tid: i32, instruction: u64) -> bool {
    let Ok(Some(rseq)) = ptrace::restartable_sequence(tid) else { return false };
    // `struct rseq`: cpu_id_start, cpu_id (32 bits each), rseq_cs.
    let Some([descriptor]) = words(pid, rseq + 8) else { return false };
    if descriptor == 0 {
        return false;
    }
    // `struct rseq_cs`: version and flags, start_ip, post_commit_offset.
    words(pid, descriptor)
        .is_some_and(|[_, start, length]| instruction.wrapping_sub(start) < length)
}

fn words<const N: usize>(pid: i32, address: u64) -> Option<[u64; N]> {
    let mut bytes = vec![0; N * 8];
    let read = sys::process::read(pid, &[(address, bytes.len())], &mut bytes).ok()?;
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(bytes.try_into().ok()?);
    }
    (read == bytes.len()).then_some(words)
}

#[cfg(target_arch = "x86_64")]
mod arch {
    use super::Registers;

    pub const SUPPORTED: bool = true;
    /// `syscall`
    pub const CALL: [u8; 2] = [0x0f, 0x05];
    /// The code segment of 64-bit programs (`__USER_CS`).
    const CODE_SEGMENT: u64 = 0x33;
    /// Single steps would stop the thread in between.
    const TRAP_FLAG: u64 = 1 << 8;

    pub fn is_native(registers: &Registers) -> bool {
        registers.cs == CODE_SEGMENT
    }

    pub fn instruction(registers: &Registers) -> u64 {
        registers.rip
    }

    pub fn set_call(registers: &mut Registers, at: u64, number: libc::c_long, arguments: [u64; 3]) {
        registers.rip = at;
        registers.rax = number as u64;
        // Otherwise the kernel would take this for the end of the system call
        // that it interrupted, and move the instruction pointer back to it.
        registers.orig_rax = u64::MAX;
        registers.eflags &= !TRAP_FLAG;
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
    }

    pub fn result(registers: &Registers) -> i64 {
        registers.rax as i64
    }
}

/// Elsewhere the kernel restarts an interrupted system call in other ways
/// (arm64 has decided before the thread stops); until somebody has tried it,
/// the next backend does.
#[cfg(not(target_arch = "x86_64"))]
mod arch {
    use super::Registers;

    pub const SUPPORTED: bool = false;
    pub const CALL: [u8; 4] = [0; 4];

    pub fn is_native(_: &Registers) -> bool {
        false
    }

    pub fn instruction(_: &Registers) -> u64 {
        0
    }

    pub fn set_call(_: &mut Registers, _: u64, _: libc::c_long, _: [u64; 3]) {}

    pub fn result(_: &Registers) -> i64 {
        -i64::from(libc::ENOSYS)
    }
}

pub(crate) const SUPPORTED: bool = arch::SUPPORTED;
