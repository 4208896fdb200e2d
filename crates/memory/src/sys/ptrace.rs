//! ptrace(2) on one thread of another process, without waitpid(2).
//!
//! Whoever collects children in this process (a shim does) would take the
//! reports of our tracees with them. So nothing here waits: a stopped thread
//! is one that answers PTRACE_GETSIGINFO, and the answer says why it stopped.
//! All calls about one thread come from one thread of ours, and the end of
//! that thread detaches whatever is still attached.

use std::{io, ptr};

use libc::{c_int, c_long, c_uint, pid_t};

/// Registers, as the architecture has them.
pub(crate) type Registers = libc::user_regs_struct;

/// Not in libc: `linux/ptrace.h`.
const PTRACE_EVENT_STOP: c_int = 128;
/// What the first field of a stop's siginfo carries for a system call when
/// PTRACE_O_TRACESYSGOOD is set.
const SYSTEM_CALL: c_int = libc::SIGTRAP | 0x80;
/// Bytes of the kernel's signal set, which is not the C library's.
const SIGNAL_SET: usize = size_of::<u64>();

/// Why a thread stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// PTRACE_INTERRUPT, or a job control stop.
    Trap,
    /// Entry to or exit from a system call.
    SystemCall,
    /// This signal is about to be delivered.
    Signal(c_int),
}

/// Attaches without stopping. `unfiltered`: the thread's seccomp filters do
/// not apply while it is attached.
pub(crate) fn seize(tid: pid_t, unfiltered: bool) -> io::Result<()> {
    let mut options = libc::PTRACE_O_TRACESYSGOOD;
    if unfiltered {
        options |= libc::PTRACE_O_SUSPEND_SECCOMP;
    }
    request(libc::PTRACE_SEIZE, tid, 0, options as usize)
}

pub(crate) fn interrupt(tid: pid_t) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0)
}

/// Runs on, delivering `signal` unless it is 0.
pub(crate) fn resume(tid: pid_t, signal: c_int) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize)
}

/// Runs on to the next entry to or exit from a system call.
pub(crate) fn resume_to_system_call(tid: pid_t, signal: c_int) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, signal as usize)
}

pub(crate) fn detach(tid: pid_t) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, 0)
}

/// Why the thread stands still; None while it runs, and once it is gone.
pub(crate) fn stop(tid: pid_t) -> io::Result<Option<Stop>> {
    // SAFETY: a siginfo of zeroes is a valid one.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    match request(libc::PTRACE_GETSIGINFO, tid, 0, (&raw mut info) as usize) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
        Ok(()) if info.si_code >> 8 == PTRACE_EVENT_STOP => Ok(Some(Stop::Trap)),
        Ok(()) if info.si_code == SYSTEM_CALL => Ok(Some(Stop::SystemCall)),
        Ok(()) => Ok(Some(Stop::Signal(info.si_signo))),
    }
}

pub(crate) fn registers(tid: pid_t) -> io::Result<Registers> {
    // SAFETY: registers are numbers; zeroes are valid ones.
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    let mut vector = vector_of(&raw mut registers);
    let which = libc::NT_PRSTATUS as usize;
    request(libc::PTRACE_GETREGSET, tid, which, (&raw mut vector) as usize)?;
    // A 32-bit process answers with fewer.
    if vector.iov_len != size_of::<Registers>() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(registers)
}

pub(crate) fn set_registers(tid: pid_t, registers: &Registers) -> io::Result<()> {
    let mut registers = *registers;
    let mut vector = vector_of(&raw mut registers);
    let which = libc::NT_PRSTATUS as usize;
    request(libc::PTRACE_SETREGSET, tid, which, (&raw mut vector) as usize)
}

/// The blocked signals, one bit each.
pub(crate) fn signal_mask(tid: pid_t) -> io::Result<u64> {
    let mut mask = 0u64;
    request(libc::PTRACE_GETSIGMASK, tid, SIGNAL_SET, (&raw mut mask) as usize)?;
    Ok(mask)
}

pub(crate) fn set_signal_mask(tid: pid_t, mask: u64) -> io::Result<()> {
    request(libc::PTRACE_SETSIGMASK, tid, SIGNAL_SET, (&raw const mask) as usize)
}

/// Where the thread's restartable sequence is described, if it has one
/// (rseq(2)): the address of its `struct rseq`.
pub(crate) fn restartable_sequence(tid: pid_t) -> io::Result<Option<u64>> {
    /// `struct ptrace_rseq_configuration`.
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        address: u64,
        size: u32,
        signature: u32,
        flags: u32,
        padding: u32,
    }
    const _: () = assert!(size_of::<Configuration>() == 24);
    let mut at = Configuration::default();
    let size = size_of::<Configuration>();
    match request(libc::PTRACE_GET_RSEQ_CONFIGURATION, tid, size, (&raw mut at) as usize) {
        Ok(()) => Ok((at.address != 0).then_some(at.address)),
        // A kernel without it has no way to tell, nor one without rseq.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn vector_of(registers: *mut Registers) -> libc::iovec {
    libc::iovec { iov_base: registers.cast(), iov_len: size_of::<Registers>() }
}

fn request(what: c_uint, tid: pid_t, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: `data` is a number for the requests that take one and, for
    // those that take memory, the address of a local of the caller's that
    // outlives the call and has the size the kernel goes by (asserted, or
    // told in `address` or in the vector). Nothing of ours is traced.
    let done: c_long = unsafe {
        libc::ptrace(
            what,
            tid,
            ptr::without_provenance_mut::<libc::c_void>(address),
            ptr::with_exposed_provenance_mut::<libc::c_void>(data),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
