//! Programs that the kernel runs for us over what a process has mapped
//! (iterators of bpf(2); for one process alone since Linux 6.1).

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Read},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::libc;
use transship_types::PAGE;

/// Commands, kinds of programs and of attachments of linux/bpf.h.
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const ITER_CREATE: libc::c_int = 33;
const PROG_TYPE_TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;

/// `union bpf_attr` for PROG_LOAD, up to the last field that we set.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}

const _: () = assert!(size_of::<Load>() == 112);

/// The same for LINK_CREATE.
#[repr(C)]
struct Link {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    _end: u32,
}

const _: () = assert!(size_of::<Link>() == 32);

/// `union bpf_iter_link_info`, for one task.
#[repr(C)]
struct OneTask {
    tid: u32,
    pid: u32,
    pid_fd: u32,
    _rest: u32,
}

const _: () = assert!(size_of::<OneTask>() == 16);

/// The same for ITER_CREATE.
#[repr(C)]
struct Iteration {
    link_fd: u32,
    flags: u32,
}

/// The kernel's own has eight pages, and never gives more at once.
const BUFFER: usize = 8 * PAGE as usize;

/// Has the kernel check a program for the iterator whose function has this
/// number in its description of itself. Tells nothing of why it does not.
pub fn load_iterator(program: &[u64], iterator: u32, license: &CStr) -> io::Result<OwnedFd> {
    let mut prog_name = [0; 16];
    prog_name[..9].copy_from_slice(b"transship");
    let load = Load {
        prog_type: PROG_TYPE_TRACING,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        prog_name,
        expected_attach_type: TRACE_ITER,
        attach_btf_id: iterator,
        ..Load::default()
    };
    // SAFETY: program and license outlive the call; the program is
    // `insn_cnt` instructions long, and what is in them the kernel checks.
    unsafe { bpf(PROG_LOAD, &load) }
}

/// What such a program writes about one process, in whole entries, given to
/// `take` until that says no. It must: where there is more than one buffer
/// full, Linux begins the last ones again and again.
pub fn iterate(
    program: BorrowedFd<'_>,
    pid: i32,
    mut take: impl FnMut(&[u8]) -> bool,
) -> io::Result<()> {
    let task = OneTask { tid: pid as u32, pid: 0, pid_fd: 0, _rest: 0 };
    let link = Link {
        prog_fd: number(program.as_raw_fd()),
        target_fd: 0,
        attach_type: TRACE_ITER,
        flags: 0,
        iter_info: &raw const task as u64,
        iter_info_len: size_of::<OneTask>() as u32,
        _end: 0,
    };
    // SAFETY: `task` outlives the call and is as long as it says.
    let link = unsafe { bpf(LINK_CREATE, &link) }?;
    let iteration = Iteration { link_fd: number(link.as_raw_fd()), flags: 0 };
    // SAFETY: integers only.
    let iteration = unsafe { bpf(ITER_CREATE, &iteration) }?;
    let mut iteration = File::from(iteration);
    let mut written = vec![0; BUFFER];
    loop {
        let bytes = iteration.read(&mut written)?;
        if bytes == 0 || !take(&written[..bytes]) {
            return Ok(());
        }
    }
}

fn number(fd: RawFd) -> u32 {
    fd as u32
}

/// # Safety
///
/// `attributes` has the layout of this command in `union bpf_attr`, and what
/// it points to outlives the call.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller says. The kernel takes missing fields for zero.
    let fd =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
