//! The one system call that no safe wrapper offers.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Writes the file's dirty pages out and waits for them.
///
/// Not for durability: writing a page out makes its shared mappings read-only
/// again, so that the next store through a mapping faults and moves the
/// file's ctime. Unlike fdatasync(2) it forces no journal commit, of which a
/// layer of many small files would need as many.
pub(crate) fn write_out(file: BorrowedFd<'_>) -> io::Result<()> {
    let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: takes no pointers; `file` is open for the duration of the call.
    // Offset 0 and length 0 mean the whole file.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, all) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
