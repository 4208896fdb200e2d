//! The calls that stand in front of the C library's.

use std::{
    ffi::{c_int, c_void},
    io,
    mem::{MaybeUninit, zeroed},
};

use libc::off64_t;

use crate::Object;

/// lseek(2), as CRIU calls it. CRIU is built for 64-bit machines, on which the
/// two names are one.
// SAFETY: the same name and shape as in the C library, in front of which it is
// meant to stand.
#[unsafe(no_mangle)]
pub extern "C" fn lseek(descriptor: c_int, offset: off64_t, whence: c_int) -> off64_t {
    if whence == libc::SEEK_DATA && object(descriptor).is_some_and(crate::is_hollow) {
        fail(libc::ENXIO);
        return -1;
    }
    // SAFETY: takes no pointer; the kernel checks all three, and the C library
    // sets errno.
    unsafe { libc::syscall(libc::SYS_lseek, descriptor, offset, whence) }
}

// SAFETY: as above.
#[unsafe(no_mangle)]
pub extern "C" fn lseek64(descriptor: c_int, offset: off64_t, whence: c_int) -> off64_t {
    lseek(descriptor, offset, whence)
}

/// recv(2), as CRIU reads a request: descriptors that come with it are put in
/// their places. Without any it is what the C library's is.
///
/// # Safety
///
/// As for the C library's: `buffer` has room for `length` bytes.
// SAFETY: the same name and shape as in the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recv(
    socket: c_int,
    buffer: *mut c_void,
    length: usize,
    flags: c_int,
) -> isize {
    let mut vector = libc::iovec { iov_base: buffer, iov_len: length };
    let mut control = Control::empty();
    // SAFETY: a message header of zeroes is a valid one, and an empty one.
    let mut message: libc::msghdr = unsafe { zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut vector, 1);
    // Whoever only looks gets nothing yet.
    if flags & libc::MSG_PEEK == 0 {
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>();
    }
    let flags = flags | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header names the caller's buffer, as long as it says, and
    // `control`; both outlive the call. The system call and not the function,
    // in front of which others may stand.
    let read = unsafe { libc::syscall(libc::SYS_recvmsg, socket, &raw mut message, flags) };
    if read < 0 {
        return read as isize;
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 && message.msg_controllen > 0 {
        // Some are lost. Without one of them CRIU would take another file.
        fail(libc::EMSGSIZE);
        return -1;
    }
    match place(&message) {
        Ok(()) => read as isize,
        Err(error) => {
            fail(error.raw_os_error().unwrap_or(libc::EIO));
            -1
        }
    }
}

/// Room for as many descriptors as one message may carry (SCM_MAX_FD).
#[repr(C, align(8))]
struct Control([u8; Control::BYTES]);

impl Control {
    const BYTES: usize = 16 + 253 * size_of::<c_int>() + 4;

    fn empty() -> Self {
        Self([0; Self::BYTES])
    }
}

// SAFETY: computes a number and touches nothing.
const _: () = assert!(
    Control::BYTES == unsafe { libc::CMSG_SPACE(253 * size_of::<c_int>() as u32) } as usize
);

/// Moves what came to the numbers from [`crate::PLACE`] on. One that is taken
/// is an error: a request must never name another file than was meant.
fn place(message: &libc::msghdr) -> io::Result<()> {
    let mut to = crate::PLACE;
    // SAFETY: the kernel has filled the header and the control messages in it.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: null, or a header within the control buffer.
    while let Some(header) = unsafe { next.as_ref() } {
        if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: as above.
            let data = unsafe { libc::CMSG_DATA(next) }.cast::<c_int>();
            // SAFETY: computes a number and touches nothing.
            let bytes = header.cmsg_len - unsafe { libc::CMSG_LEN(0) } as usize;
            for index in 0..bytes / size_of::<c_int>() {
                // SAFETY: within the message's data, by the kernel's length.
                move_to(unsafe { data.add(index).read_unaligned() }, to)?;
                to += 1;
            }
        }
        // SAFETY: `next` is a header of this message.
        next = unsafe { libc::CMSG_NXTHDR(message, next) };
    }
    Ok(())
}

fn move_to(from: c_int, to: c_int) -> io::Result<()> {
    if from == to {
        return Ok(());
    }
    // SAFETY: asks about a number.
    if unsafe { libc::fcntl(to, libc::F_GETFD) } >= 0 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: both are numbers; `from` has just come and is nobody else's.
    if unsafe { libc::dup3(from, to, libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above, and its copy is where it belongs.
    unsafe { libc::close(from) };
    Ok(())
}

fn fail(errno: c_int) {
    // SAFETY: the C library gives each thread its own, always there.
    unsafe { *libc::__errno_location() = errno };
}

pub fn object(descriptor: c_int) -> Option<Object> {
    let mut stat = MaybeUninit::<libc::stat64>::uninit();
    // SAFETY: `stat` has room for what the kernel writes; a bad descriptor is
    // its to refuse.
    if unsafe { libc::fstat64(descriptor, stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: the call has succeeded, so it is filled.
    let stat = unsafe { stat.assume_init() };
    Some((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
pub fn data(file: &std::fs::File) -> Option<i64> {
    use std::os::fd::AsRawFd;
    let found = lseek(file.as_raw_fd(), 0, libc::SEEK_DATA);
    (found >= 0).then_some(found)
}

#[cfg(test)]
pub fn end(file: &std::fs::File) -> i64 {
    use std::os::fd::AsRawFd;
    lseek(file.as_raw_fd(), 0, libc::SEEK_END)
}

/// Sends bytes with descriptors, as the gate does.
#[cfg(test)]
pub fn send(socket: &impl std::os::fd::AsRawFd, bytes: &[u8], descriptors: &[c_int]) {
    let mut control = Control::empty();
    let mut vector =
        libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: everything the header names lives until the call returns, and
    // the control buffer has room for as many descriptors as may be sent.
    unsafe {
        let mut message: libc::msghdr = zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut vector, 1);
        if !descriptors.is_empty() {
            let length = size_of_val(descriptors) as u32;
            message.msg_control = (&raw mut control).cast();
            message.msg_controllen = libc::CMSG_SPACE(length) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as usize;
            let data = libc::CMSG_DATA(header).cast::<c_int>();
            data.copy_from_nonoverlapping(descriptors.as_ptr(), descriptors.len());
        }
        let sent = libc::sendmsg(socket.as_raw_fd(), &raw const message, 0);
        assert_eq!(sent, bytes.len() as isize, "{}", io::Error::last_os_error());
    }
}

/// What CRIU's own call would answer.
#[cfg(test)]
pub fn received(socket: &impl std::os::fd::AsRawFd, into: &mut [u8], flags: c_int) -> isize {
    // SAFETY: a buffer with its own length.
    unsafe { recv(socket.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), flags) }
}
