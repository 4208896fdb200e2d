//! The calls that stand in front of the C library's.

use std::ffi::c_int;

use libc::off64_t;

use crate::Object;

/// lseek(2), as CRIU calls it. CRIU is built for 64-bit machines, on which the
/// two names are one.
// SAFETY: the same name and shape as in the C library, in front of which it is
// meant to stand.
#[unsafe(no_mangle)]
pub extern "C" fn lseek(descriptor: c_int, offset: off64_t, whence: c_int) -> off64_t {
    if whence == libc::SEEK_DATA && object(descriptor).is_some_and(crate::is_hollow) {
        // SAFETY: the C library gives each thread its own, always there.
        unsafe { *libc::__errno_location() = libc::ENXIO };
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

pub fn object(descriptor: c_int) -> Option<Object> {
    let mut stat = std::mem::MaybeUninit::<libc::stat64>::uninit();
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
