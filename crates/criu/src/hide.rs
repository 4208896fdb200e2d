//! A container whose private memory CRIU does not see.
//!
//! # Pages
//!
//! CRIU learns which pages a process has from `/proc/PID/pagemap`, and saves
//! them inside the pause. Ours have gone over already. So for the dump
//! that path is covered, in a mount namespace that only CRIU is in, with the
//! pagemap of a process *without an address space*: a real pagemap for every
//! way of asking (reading, `PAGEMAP_SCAN`), which says at the kernel's own
//! speed that there is nothing. What CRIU saves whatever the pagemap says
//! (the vDSO, shared memory) it still saves.
//!
//! ```text
//! gate (isolated) ─▶ stub: own mount namespace ─▶ CRIU, waits for DUMP
//! Hider::prepare   ─▶ empty process; our thread joins CRIU's namespace
//! … freeze …
//! Hider::hide      ─▶ two bind mounts per process    (all that the pause sees)
//! … dump …
//! drop(Hidden)     ─▶ empty process gone; the mounts end with the namespace
//! ```
//!
//! The images are completed from what was sent ([`pages`](crate::pages)).
//!
//! A file of our own in the pagemap's place would not do: CRIU 4.2 asks for
//! guard regions by `PAGEMAP_SCAN` even where it is told to read pages
//! otherwise, and a file has no such call. Nor need the emptiness be perfect
//! for a sound image: a page too many that CRIU believes in is saved with the
//! container's own bytes.
//!
//! # Mappings
//!
//! CRIU learns what a process has mapped from `/proc/PID/smaps`, and takes
//! from it what `/proc/PID/maps` says as well, and the flags. For the rest of
//! that file the kernel looks at every page, some 13 ms for each GiB of them.
//! So that path is covered too, with a file of just what CRIU reads: the
//! lines of `maps` and the [`flags`], found out when every task stands still.
//! Where the kernel cannot tell the flags alone, CRIU reads its file: the same
//! answer, and a pause that grows with memory.

mod btf;
mod flags;
mod smaps;

use std::{
    fs, io,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
};

use nix::libc;
use tracing::{debug, info, warn};

use self::flags::Flags;
use crate::{CriuError, sys};

/// The empty process is there, and a thread of ours in CRIU's namespace.
/// Dropped, both go.
#[must_use]
pub struct Hider {
    orders: Sender<Order>,
}

/// Processes whose pages CRIU does not see. Keep it until CRIU has answered
/// `post-dump`: without the empty process the dump fails.
#[must_use]
pub struct Hidden {
    /// The thread ends when this is gone.
    _orders: Sender<Order>,
    listed: usize,
}

struct Order {
    pids: Vec<i32>,
    done: Sender<Result<usize, CriuError>>,
}

impl Hider {
    /// Everything slow, before the freeze. `criu_pid` is that of a CRIU which
    /// came through an [isolated](crate::Gate::isolate) gate. Blocks for some
    /// milliseconds.
    pub fn prepare(criu_pid: i32) -> Result<Self, CriuError> {
        let (orders, inbox) = channel();
        let (ready, prepared) = channel();
        thread::Builder::new()
            .name("hider".into())
            .spawn(move || serve(criu_pid, &ready, &inbox))
            .map_err(|source| CriuError::Hide { what: "starting a thread", source })?;
        prepared.recv().map_err(|_| CriuError::Closed)??;
        Ok(Self { orders })
    }

    /// Hides the private pages of these processes, which must not run. Blocks
    /// for some 100 µs each.
    ///
    /// After an error nothing is hidden and CRIU may do an ordinary dump,
    /// except after [`CriuError::HalfHidden`]: that dump would lose memory.
    pub fn hide(self, pids: &[i32]) -> Result<Hidden, CriuError> {
        let (done, answer) = channel();
        let order = Order { pids: pids.to_vec(), done };
        self.orders.send(order).map_err(|_| CriuError::Closed)?;
        // A thread that died while it mounted: nobody knows how far it came.
        let listed = answer.recv().map_err(|_| CriuError::HalfHidden)??;
        Ok(Hidden { _orders: self.orders, listed })
    }
}

impl Hidden {
    /// Of how many processes CRIU reads our list of mappings, and not the
    /// kernel's.
    pub fn listed(&self) -> usize {
        self.listed
    }
}

/// Whether this kernel tells the flags of mappings without a look at pages. If
/// not, all goes on, and takes longer.
pub fn lists_mappings() -> Result<(), CriuError> {
    let tried = Flags::new().map(drop);
    tried.map_err(|source| CriuError::Hide { what: "finding the flags of mappings", source })
}

/// The thread's life. It never goes back to our own mount namespace: it ends.
fn serve(criu_pid: i32, ready: &Sender<Result<(), CriuError>>, inbox: &Receiver<Order>) {
    // First of all, while `/proc/self` is what it says.
    let flags = Flags::new();
    let cover = match prepare(criu_pid, flags) {
        Ok(cover) => cover,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    if ready.send(Ok(())).is_err() {
        return;
    }
    while let Ok(order) = inbox.recv() {
        let covered = cover.pagemaps(&order.pids).map(|()| cover.lists(&order.pids));
        let _ = order.done.send(covered);
    }
}

/// What the files of processes are covered with.
struct Cover {
    empty: sys::EmptyProcess,
    /// Missing where the kernel cannot tell them.
    flags: Option<Flags>,
}

fn prepare(criu_pid: i32, flags: io::Result<Flags>) -> Result<Cover, CriuError> {
    let empty = sys::EmptyProcess::create()
        .map_err(|source| CriuError::Hide { what: "making a process without memory", source })?;
    let joined = sys::join_mount_namespace(criu_pid)
        .map_err(|source| CriuError::Hide { what: "joining CRIU's mount namespace", source })?;
    // A bind mount in the host's own namespace would blind every process.
    if !joined {
        return Err(CriuError::NotIsolated);
    }
    let ready = flags.and_then(|flags| sys::mount_tmpfs(&place(&empty)).map(|()| flags));
    let flags = ready.inspect_err(|error| {
        info!(%error, "CRIU reads smaps: the pause grows with memory");
    });
    Ok(Cover { empty, flags: flags.ok() })
}

impl Cover {
    fn pagemaps(&self, pids: &[i32]) -> Result<(), CriuError> {
        let empty = pagemap(self.empty.pid());
        for (index, &pid) in pids.iter().enumerate() {
            match sys::bind_mount(&empty, &pagemap(pid)) {
                Ok(()) => {}
                // It ended before the freeze: CRIU does not see it either.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    uncover(&pids[..index])?;
                    return Err(CriuError::Hide { what: "covering a pagemap", source });
                }
            }
        }
        Ok(())
    }

    /// As many as can be; the kernel's own tell the same.
    fn lists(&self, pids: &[i32]) -> usize {
        let Some(flags) = &self.flags else { return 0 };
        let mut listed = 0;
        for &pid in pids {
            match self.list(flags, pid) {
                Ok(true) => listed += 1,
                Ok(false) => debug!(pid, "CRIU reads the kernel's list of its mappings"),
                Err(error) => debug!(pid, %error, "CRIU reads the kernel's list of its mappings"),
            }
        }
        listed
    }

    fn list(&self, flags: &Flags, pid: i32) -> io::Result<bool> {
        let maps = fs::read(format!("/proc/{pid}/maps"))?;
        let Some(list) = smaps::join(&maps, &flags.of(pid)?) else { return Ok(false) };
        let path = format!("{}/{pid}", place(&self.empty));
        fs::write(&path, list)?;
        sys::bind_mount(&path, &format!("/proc/{pid}/smaps"))?;
        Ok(true)
    }
}

/// Where the lists are: a directory that CRIU has no reason to look into, and
/// that goes with the process.
fn place(empty: &sys::EmptyProcess) -> String {
    format!("/proc/{}/task", empty.pid())
}

fn uncover(pids: &[i32]) -> Result<(), CriuError> {
    for &pid in pids {
        match sys::unmount(&pagemap(pid)) {
            Ok(()) => {}
            // Gone, or never covered: see `Cover::pagemaps`.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {}
            Err(error) => {
                warn!(pid, %error, "a pagemap stays covered");
                return Err(CriuError::HalfHidden);
            }
        }
    }
    Ok(())
}

fn pagemap(pid: i32) -> String {
    format!("/proc/{pid}/pagemap")
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::Read,
        os::unix::fs::FileExt,
        process::{Child, Command, Stdio},
    };

    use nix::{
        sys::{
            signal::{Signal, kill},
            wait::{WaitPidFlag, waitpid},
        },
        unistd::Pid,
    };

    use super::*;

    /// Stands for CRIU: a process in a mount namespace of its own.
    struct Isolated(Child);

    impl Isolated {
        fn start() -> Self {
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "slave", "sh", "-c", "echo; exec sleep 600"]);
            let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
            Self(child)
        }

        fn pid(&self) -> i32 {
            self.0.id() as i32
        }

        fn stand_still(&self) {
            let pid = Pid::from_raw(self.pid());
            kill(pid, Signal::SIGSTOP).unwrap();
            waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
        }

        /// The list of mappings of `of` that it sees.
        fn list(&self, of: u32) -> String {
            fs::read_to_string(format!("/proc/{}/root/proc/{of}/smaps", self.pid())).unwrap()
        }

        /// Which pages of `of` around an address of ours it sees.
        fn sees(&self, of: u32, address: usize) -> Vec<u8> {
            let path = format!("/proc/{}/root/proc/{of}/pagemap", self.pid());
            let mut entry = vec![0; 8];
            let pagemap = File::open(path).unwrap();
            let read = pagemap.read_at(&mut entry, (address / 4096 * 8) as u64).unwrap();
            entry[..read].to_vec()
        }
    }

    impl Drop for Isolated {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn empty_processes() -> Vec<String> {
        let own = format!("/proc/{}/task", std::process::id());
        let children = fs::read_dir(own)
            .unwrap()
            .flatten()
            .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        children
            .flat_map(|pids| pids.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .filter(|pid| {
                let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                comm.trim() == "transship-empty"
            })
            .collect()
    }

    #[test]
    fn only_the_isolated_one_sees_nothing_and_only_for_as_long() {
        let criu = Isolated::start();
        let (own, here) = (std::process::id(), Box::new(7_u64));
        let address = &raw const *here as usize;
        let seen = criu.sees(own, address);
        assert!(seen.iter().any(|byte| *byte != 0), "the page is there: {seen:?}");

        let hidden = Hider::prepare(criu.pid()).unwrap().hide(&[own as i32, i32::MAX]).unwrap();
        assert_eq!(criu.sees(own, address), [0; 8]);
        let mut entry = [0; 8];
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        pagemap.read_exact_at(&mut entry, (address / 4096 * 8) as u64).unwrap();
        assert_ne!(entry, [0; 8], "it is hidden from everybody");

        let empty = empty_processes();
        assert_eq!(empty.len(), 1, "{empty:?}");
        assert_eq!(fs::read_dir(format!("/proc/{}/fd", empty[0])).unwrap().count(), 0);
        drop(hidden);
        while fs::exists(format!("/proc/{}", empty[0])).unwrap() {
            thread::yield_now();
        }
    }

    #[test]
    fn it_reads_a_list_of_mappings_without_a_look_at_pages() {
        let (criu, mapped) = (Isolated::start(), Isolated::start());
        let (pid, own) = (mapped.pid(), std::process::id() as i32);
        mapped.stand_still();
        let real = criu.list(pid as u32);
        assert!(real.contains("Rss:"), "{real}");
        let hidden = Hider::prepare(criu.pid()).unwrap().hide(&[pid, i32::MAX]).unwrap();
        if let Err(error) = Flags::new() {
            eprintln!("note: CRIU reads smaps on this kernel: {error}");
            assert_eq!((hidden.listed(), criu.list(pid as u32)), (0, real));
            return;
        }
        assert_eq!(hidden.listed(), 1);
        let list = criu.list(pid as u32);
        assert!(!list.contains("Rss:"), "{list}");
        assert_eq!(smaps::entries(list.as_bytes()).len(), smaps::entries(real.as_bytes()).len());
        assert!(criu.list(own as u32).contains("Rss:"), "that of another process");
        let everybodys = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        assert!(everybodys.contains("Rss:"), "it is covered for everybody");
        drop(hidden);
    }

    #[test]
    fn a_criu_that_is_not_isolated_is_refused() {
        let error = Hider::prepare(std::process::id() as i32).err().unwrap();
        assert!(matches!(error, CriuError::NotIsolated), "{error:?}");
    }
}
