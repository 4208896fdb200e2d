//! What the watched program does to its memory; none of it is safe.

use std::{
    io, ptr,
    sync::atomic::{AtomicU64, Ordering},
};

pub const PAGE: usize = 4096;

fn done(result: libc::c_long) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub fn map(pages: usize, protection: i32, flags: i32, fd: i32) -> io::Result<usize> {
    // SAFETY: a new mapping where the kernel likes it touches nothing.
    let at = unsafe { libc::mmap(ptr::null_mut(), pages * PAGE, protection, flags, fd, 0) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at as usize) }
}

pub fn unmap(at: usize, pages: usize) -> io::Result<()> {
    // SAFETY: only mappings made by `map`, whose addresses the test knows and
    // nothing else uses.
    done(unsafe { libc::munmap(at as *mut _, pages * PAGE) }.into()).map(drop)
}

/// Somewhere else, with another length.
pub fn remap(at: usize, pages: usize, new: usize) -> io::Result<usize> {
    let to = map(new, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: as in `unmap`; what is replaced has just been made for it.
    let moved = unsafe {
        libc::mremap(at as *mut _, pages * PAGE, new * PAGE, flags, to as *mut libc::c_void)
    };
    if moved == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(moved as usize) }
}

pub fn protect(at: usize, pages: usize, protection: i32) -> io::Result<()> {
    // SAFETY: as in `unmap`.
    done(unsafe { libc::mprotect(at as *mut _, pages * PAGE, protection) }.into()).map(drop)
}

pub fn advise(at: usize, pages: usize, advice: i32) -> io::Result<()> {
    // SAFETY: as in `unmap`.
    done(unsafe { libc::madvise(at as *mut _, pages * PAGE, advice) }.into()).map(drop)
}

/// One word in each page. Other threads may do the same.
pub fn write(at: usize, pages: usize, value: u64) {
    for page in 0..pages {
        // SAFETY: as in `unmap`; atomic, and pages are aligned.
        unsafe { AtomicU64::from_ptr((at + page * PAGE + 8) as *mut u64) }
            .store(value + page as u64, Ordering::Relaxed);
    }
}

/// Touches pages without writing.
pub fn look(at: usize, pages: usize) -> u64 {
    (0..pages)
        // SAFETY: as in `write`.
        .map(|page| unsafe { AtomicU64::from_ptr((at + page * PAGE + 8) as *mut u64) })
        .map(|word| word.load(Ordering::Relaxed))
        .fold(0, u64::wrapping_add)
}

/// None in the child.
pub fn fork() -> io::Result<Option<i32>> {
    // SAFETY: the program has one thread, or its child calls nothing that
    // could wait for a lock of another.
    let pid = done(unsafe { libc::fork() }.into())? as i32;
    Ok((pid != 0).then_some(pid))
}

/// Returns when the child, which shares our memory, has read a byte from the
/// standard input.
pub fn vfork_until_read() -> io::Result<()> {
    // SAFETY: the child makes two system calls, neither of which touches
    // memory that its parent uses meanwhile, and leaves.
    unsafe {
        #[expect(deprecated, reason = "what old programs do is what is tested")]
        let pid = libc::vfork();
        if pid == 0 {
            let mut byte = 0u8;
            libc::read(0, (&raw mut byte).cast(), 1);
            libc::_exit(0);
        }
        done(pid.into())?;
        libc::waitpid(pid, ptr::null_mut(), 0);
    }
    Ok(())
}

static COUNTED: AtomicU64 = AtomicU64::new(0);

/// Counts the signals of this number from here on.
pub fn count(signal: i32) {
    extern "C" fn handle(_: i32) {
        COUNTED.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the handler adds to a number, which is safe in a signal handler.
    unsafe { libc::signal(signal, handle as *const () as libc::sighandler_t) };
}

pub fn counted() -> u64 {
    COUNTED.load(Ordering::Relaxed)
}

/// Sends a signal that is not merged with others of its number.
pub fn queue(pid: i32, signal: i32) -> io::Result<()> {
    let value = libc::sigval { sival_ptr: ptr::null_mut() };
    // SAFETY: takes numbers, here of a process of the test's.
    done(unsafe { libc::sigqueue(pid, signal, value) }.into()).map(drop)
}

/// Whether every thread of the process waits for something.
pub fn asleep(pid: i32) -> bool {
    crate::target::threads(pid).iter().all(|state| *state == b'S')
}

/// From here on userfaultfd(2) and ptrace(2) kill whoever calls them.
pub fn forbid() -> io::Result<()> {
    let jump =
        |number: i64, skip| libc::sock_filter { code: 0x15, jt: skip, jf: 0, k: number as u32 };
    let answer = |what| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: what };
    let mut filter = [
        libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 },
        jump(libc::SYS_userfaultfd, 2),
        jump(libc::SYS_ptrace, 1),
        answer(libc::SECCOMP_RET_ALLOW),
        answer(libc::SECCOMP_RET_KILL_PROCESS),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: takes numbers, and the program above for the call's duration.
    unsafe {
        done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        let mode = libc::SECCOMP_MODE_FILTER;
        done(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program).into())?;
    }
    Ok(())
}

/// The program's own userfaultfd, registered for missing pages. Stays open.
pub fn own_userfaultfd(at: usize, pages: usize) -> io::Result<()> {
    #[repr(C)]
    struct Register([u64; 4]);
    let mut api = [0xaau64, 0, 0];
    let mut register = Register([at as u64, (pages * PAGE) as u64, 1, 0]);
    // SAFETY: the layouts of `struct uffdio_api` and `struct uffdio_register`,
    // on the stack for the duration of the calls.
    unsafe {
        let fd = done(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC))? as i32;
        done(libc::ioctl(fd, 0xc018_aa3f, api.as_mut_ptr()).into())?;
        done(libc::ioctl(fd, 0xc020_aa00, &raw mut register).into())?;
    }
    Ok(())
}

/// Opens descriptors until there are no more to be had.
pub fn use_up_descriptors() {
    // SAFETY: takes a number.
    while unsafe { libc::dup(0) } >= 0 {}
}

pub fn kill(pid: i32, signal: i32) {
    // SAFETY: takes numbers; the pid is a child's or this process's.
    unsafe { libc::kill(pid, signal) };
}

/// Ends with the test that started it.
pub fn end_with_parent() {
    // SAFETY: takes numbers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

pub fn wait(child: i32) {
    // SAFETY: waits for a child of ours and asks for no status.
    unsafe { libc::waitpid(child, ptr::null_mut(), 0) };
}

/// How many children have ended since.
pub fn collect_children() -> u32 {
    // SAFETY: as in `wait`.
    (0..).take_while(|_| unsafe { libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG) } > 0).count()
        as u32
}

pub fn new_session() {
    // SAFETY: takes nothing. It fails in a leader of one, which is as good.
    unsafe { libc::setsid() };
}
