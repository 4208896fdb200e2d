//! userfaultfd(2) and ioctl_userfaultfd(2): a descriptor through which one
//! process watches, and fills, the memory of another.
//!
//! No address that goes into these calls as a destination belongs to us: it
//! lies in the address space that the descriptor was made in, and a wrong one
//! is the kernel's to refuse. That is what makes the wrappers safe.

use std::{
    io,
    mem::{MaybeUninit, offset_of},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::errno::Errno;
use transship_types::{PAGE, PageRange};

/// What a descriptor can be asked for (`UFFD_FEATURE_*`).
pub mod feature {
    /// Write-protection of memory that is not anonymous.
    pub const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    /// Pages that nobody has touched can be protected, too.
    pub const WP_UNPOPULATED: u64 = 1 << 13;
    /// A write lifts the protection by itself, and nobody waits.
    pub const WP_ASYNC: u64 = 1 << 15;
}

/// What is watched in a range (`UFFDIO_REGISTER_MODE_*`). Where pages are
/// missing CRIU has said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    WriteProtect,
}

/// What the descriptor has to tell.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for the page at this address.
    Fault {
        page: u64,
    },
    /// The process has forked; this is the child's descriptor. The child runs
    /// on, but only meets pages that its parent had.
    Fork(Userfaultfd),
    Remap {
        from: u64,
        to: u64,
        bytes: u64,
    },
    /// The contents are gone, the mapping stays.
    Remove {
        start: u64,
        end: u64,
    },
    Unmap {
        start: u64,
        end: u64,
    },
}

/// How far a range was filled, and what ended it early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filled {
    pub bytes: u64,
    pub stopped: Option<Errno>,
}

/// One userfaultfd. Closing the last copy of it takes every range out of its
/// watch, and lets whoever waits in them go on.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// One for our own memory.
    pub fn create() -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let fd = unsafe {
            libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) as RawFd
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened it for us alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The handshake, once and before anything else. Answers every feature
    /// that the kernel has.
    pub fn api(&self, features: u64) -> io::Result<u64> {
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: `api` has the kernel's layout (asserted below) and outlives
        // the call, as does the descriptor.
        unsafe { ioctl::api(self.raw(), &mut api) }?;
        Ok(api.features)
    }

    pub fn register(&self, range: PageRange, mode: Mode) -> io::Result<()> {
        let mode = match mode {
            Mode::WriteProtect => REGISTER_WP,
        };
        let mut register = Register { range: range.into(), mode, ioctls: 0 };
        // SAFETY: as in `api`.
        unsafe { ioctl::register(self.raw(), &mut register) }?;
        Ok(())
    }

    /// Fills missing pages with as many bytes from `source` on in *our*
    /// memory, and wakes who waits for them.
    pub fn copy(&self, range: PageRange, source: *const u8) -> Filled {
        let mut arg =
            Copy { to: range.start(), from: source as u64, len: range.bytes(), mode: 0, copied: 0 };
        // SAFETY: as in `api`. The kernel reads `source` like a write(2) would,
        // checks it and answers EFAULT if it is not ours; whoever changes the
        // bytes meanwhile changes what is copied and breaks nothing here.
        filled(unsafe { ioctl::copy(self.raw(), &mut arg) }, arg.copied, range)
    }

    /// Fills missing pages with zeroes, and wakes who waits for them.
    pub fn zero(&self, range: PageRange) -> Filled {
        let mut arg = Zeropage { range: range.into(), mode: 0, zeroed: 0 };
        // SAFETY: as in `api`.
        filled(unsafe { ioctl::zeropage(self.raw(), &mut arg) }, arg.zeroed, range)
    }

    /// Lets those who wait in the range look again.
    pub fn wake(&self, range: PageRange) -> io::Result<()> {
        let mut range = Range::from(range);
        // SAFETY: as in `api`; the kernel only reads the range.
        unsafe { ioctl::wake(self.raw(), &mut range) }?;
        Ok(())
    }

    /// Appends what has happened to `events`, at most [`EVENTS`] of it;
    /// answers how much, 0 if nothing has.
    pub fn read(&self, events: &mut Vec<Event>) -> io::Result<usize> {
        let mut buffer = [const { MaybeUninit::<Message>::uninit() }; EVENTS];
        // SAFETY: the kernel writes at most as many bytes as the buffer has.
        let bytes =
            unsafe { libc::read(self.raw(), buffer.as_mut_ptr().cast(), size_of_val(&buffer)) };
        if bytes < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(0),
                _ => Err(error),
            };
        }
        let count = bytes as usize / size_of::<Message>();
        for message in &buffer[..count] {
            // SAFETY: the kernel writes whole messages, and has written
            // `count` of them; every bit pattern is one.
            let Message { event, first, second, third, .. } = unsafe { message.assume_init() };
            events.push(match event {
                EVENT_PAGEFAULT => Event::Fault { page: second & !(PAGE - 1) },
                EVENT_FORK => {
                    // SAFETY: reading the message has opened this descriptor
                    // in our process, and nobody else knows of it. It is the
                    // first u32 of the union: the low half on little endian.
                    let child = unsafe { OwnedFd::from_raw_fd(first as u32 as RawFd) };
                    Event::Fork(Self(child))
                }
                EVENT_REMAP => Event::Remap { from: first, to: second, bytes: third },
                EVENT_REMOVE => Event::Remove { start: first, end: second },
                EVENT_UNMAP => Event::Unmap { start: first, end: second },
                other => {
                    let text = format!("a userfaultfd tells of event {other:#x}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
            });
        }
        Ok(count)
    }

    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl From<OwnedFd> for Userfaultfd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How many messages are read at once. Few: what is read waits for us, what is
/// not can be read by another thread.
pub const EVENTS: usize = 16;

/// The kernel answers the count in the structure, negative or untouched on an
/// early error, and EAGAIN when it stopped on the way.
fn filled(result: nix::Result<libc::c_int>, count: i64, range: PageRange) -> Filled {
    match result {
        Ok(_) => Filled { bytes: range.bytes(), stopped: None },
        Err(errno) => Filled { bytes: u64::try_from(count).unwrap_or(0), stopped: Some(errno) },
    }
}

const UFFD_API: u64 = 0xAA;
const REGISTER_WP: u64 = 1 << 1;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

impl From<PageRange> for Range {
    fn from(range: PageRange) -> Self {
        Self { start: range.start(), len: range.bytes() }
    }
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zeropage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

/// `uffd_msg`, with its union as three words: flags and address of a fault;
/// the descriptor of a fork; from, to and length of a remap; start and end.
#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    first: u64,
    second: u64,
    third: u64,
}

const _: () = {
    assert!(size_of::<Api>() == 24);
    assert!(size_of::<Register>() == 32 && offset_of!(Register, mode) == 16);
    assert!(size_of::<Copy>() == 40 && offset_of!(Copy, copied) == 32);
    assert!(size_of::<Zeropage>() == 32 && offset_of!(Zeropage, zeroed) == 24);
    assert!(size_of::<Message>() == 32 && offset_of!(Message, second) == 16);
    assert!(cfg!(target_endian = "little"), "a fork's descriptor is half a word");
};

mod ioctl {
    use super::{Api, Copy, Range, Register, UFFD_API, Zeropage};

    const TYPE: u8 = UFFD_API as u8;
    nix::ioctl_readwrite!(api, TYPE, 0x3F, Api);
    nix::ioctl_readwrite!(register, TYPE, 0x00, Register);
    nix::ioctl_read!(wake, TYPE, 0x02, Range);
    nix::ioctl_readwrite!(copy, TYPE, 0x03, Copy);
    nix::ioctl_readwrite!(zeropage, TYPE, 0x04, Zeropage);
}
