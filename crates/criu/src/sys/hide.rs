//! A process without memory, and threads in other namespaces.

use std::{fs, io, os::fd::OwnedFd, path::Path};

use nix::{
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

/// Ends of address spaces, the largest first: x86-64 with five and with four
/// levels of page tables, arm64 with 52, 48, 42 and 39 bits. The kernel
/// refuses what is above its own.
const ADDRESS_SPACES: [usize; 6] =
    [(1 << 56) - 4096, 1 << 52, 1 << 48, (1 << 47) - 4096, 1 << 42, 1 << 39];

/// The child stops twice per system call, and makes fewer than a dozen.
const MOST_STOPS: usize = 64;

/// A child that is stopped for ever where it came back from unmapping all it
/// had. It is traced, so it belongs to the thread that made it; when that
/// thread ends, however it ends, the kernel kills it.
pub struct EmptyProcess(libc::pid_t);

impl EmptyProcess {
    pub fn create() -> io::Result<Self> {
        block_signals()?;
        // SAFETY: the child makes system calls only, which is what a child of
        // a process with threads may do, and never returns from `vanish`.
        let child = match unsafe { libc::fork() } {
            0 => vanish(),
            -1 => return Err(io::Error::last_os_error()),
            child => Self(child),
        };
        child.wait_for_stop()?;
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
        child.trace(libc::PTRACE_SETOPTIONS, options as usize)?;
        for _ in 0..MOST_STOPS {
            child.trace(libc::PTRACE_SYSCALL, 0)?;
            child.wait_for_stop()?;
            // The vsyscall page is listed for everybody and mapped for nobody.
            let maps = fs::read_to_string(format!("/proc/{}/maps", child.0))?;
            if maps.lines().all(|line| line.ends_with("[vsyscall]")) {
                return Ok(child);
            }
        }
        Err(io::Error::other("it keeps its memory"))
    }

    pub fn pid(&self) -> i32 {
        self.0
    }

    fn trace(&self, request: libc::c_uint, data: usize) -> io::Result<()> {
        // SAFETY: these requests take integers and touch no memory of ours.
        let answer = unsafe { libc::ptrace(request, self.0, 0_usize, data) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn wait_for_stop(&self) -> io::Result<()> {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        if unsafe { libc::waitpid(self.0, &mut status, libc::__WALL) } < 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::WIFSTOPPED(status) {
            return Ok(());
        }
        // Unmapping is refused where system mappings are sealed.
        Err(io::Error::other("it cannot be parted from its memory"))
    }
}

impl Drop for EmptyProcess {
    fn drop(&mut self) {
        // SAFETY: our child, which nobody else waits for: the pid is still its
        // own. A stopped process dies of this at once.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

/// A signal for the whole process is for its other threads; and the child,
/// which inherits the mask, must never run a handler.
fn block_signals() -> io::Result<()> {
    nix::sys::signal::SigSet::all().thread_block()?;
    Ok(())
}

/// Gives everything away: descriptors (of sockets whose end others wait for),
/// then memory.
fn vanish() -> ! {
    // SAFETY: system calls with integers and one constant string. The last
    // one takes the ground from under this very function: the tracer sees to
    // it that it does not come back.
    unsafe {
        libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
        libc::prctl(libc::PR_SET_NAME, c"transship-empty".as_ptr());
        libc::ptrace(libc::PTRACE_TRACEME, 0, 0_usize, 0_usize);
        libc::syscall(libc::SYS_kill, libc::getpid(), libc::SIGSTOP);
        for end in ADDRESS_SPACES {
            libc::syscall(libc::SYS_munmap, 0, end);
        }
        libc::_exit(1)
    }
}

/// Takes this thread into the mount namespace of `pid`; `false` if that is
/// where it was.
pub fn join_mount_namespace(pid: i32) -> io::Result<bool> {
    let theirs = fs::File::open(format!("/proc/{pid}/ns/mnt"))?;
    if namespace(&theirs)? == namespace(&fs::File::open("/proc/thread-self/ns/mnt")?)? {
        return Ok(false);
    }
    // A thread that shares its root directory with others may not move.
    unshare(CloneFlags::CLONE_FS)?;
    setns(OwnedFd::from(theirs), CloneFlags::CLONE_NEWNS)?;
    Ok(true)
}

fn namespace(file: &fs::File) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(file.metadata()?.ino())
}

/// Gives this process, which has one thread, its own mount namespace. What is
/// mounted outside still arrives; nothing goes out.
pub fn own_mount_namespace() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let nothing = None::<&str>;
    mount(nothing, "/", nothing, MsFlags::MS_SLAVE | MsFlags::MS_REC, nothing)?;
    Ok(())
}

pub fn join_network_namespace(path: &Path) -> io::Result<()> {
    setns(OwnedFd::from(fs::File::open(path)?), CloneFlags::CLONE_NEWNET)?;
    Ok(())
}

pub fn bind_mount(from: &str, over: &str) -> io::Result<()> {
    let nothing = None::<&str>;
    mount(Some(from), over, nothing, MsFlags::MS_BIND, nothing)?;
    Ok(())
}

/// An empty file system in memory over a directory, for root alone.
pub fn mount_tmpfs(over: &str) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), over, Some("tmpfs"), flags, Some("mode=0700"))?;
    Ok(())
}

pub fn unmount(path: &str) -> io::Result<()> {
    umount2(path, MntFlags::MNT_DETACH)?;
    Ok(())
}
