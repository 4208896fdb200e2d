//! A restored program, and CRIU as far as the fault server sees it.

use std::{
    fs,
    io::{BufRead, BufReader, IoSlice, IoSliceMut, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

use crate::sys::{self, PAGE};

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the page with this home of this process holds, in every word.
pub fn content(vpid: u32, home: u64) -> u64 {
    home | u64::from(vpid) << 50
}

pub struct Target {
    pub vpid: u32,
    child: Child,
    commands: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Target {
    pub fn start(vpid: u32) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = Command::new("/proc/self/exe")
            .args(["--ignored", "--exact", "--nocapture", "target::program"])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let answers = BufReader::new(ours.try_clone().unwrap());
        Self { vpid, child, answers, commands: ours }
    }

    pub fn tell(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
    }

    pub fn answer(&mut self) -> u64 {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().parse().unwrap_or_else(|_| panic!("the program says {line:?}"))
    }

    pub fn ask(&mut self, command: &str) -> u64 {
        self.tell(command);
        self.answer()
    }

    /// How many pages do not hold what belongs there.
    pub fn bad(&mut self, how: &str, start: u64, pages: u64, home: u64) -> u64 {
        let vpid = self.vpid;
        self.ask(&format!("{how} {start} {pages} {home} {vpid}"))
    }

    /// How many mappings userfaultfd still watches.
    pub fn watched(&self) -> usize {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.child.id())).unwrap();
        let flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
        flags.filter(|flags| flags.split_whitespace().any(|f| f == "um" || f == "uw")).count()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CRIU's connection to its lazy-pages daemon.
pub struct Criu(UnixStream);

impl Criu {
    pub fn connect(dir: &Path) -> Self {
        Self(UnixStream::connect(dir.join("lazy-pages.socket")).unwrap())
    }

    /// Passes on the descriptor of a task whose memory is mapped.
    pub fn task(&mut self, target: &mut Target) {
        target.tell("hand");
        let mut byte = [0];
        let mut room = nix::cmsg_space!([RawFd; 1]);
        let socket = target.commands.as_raw_fd();
        let mut parts = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(socket, &mut parts, Some(&mut room), flags).unwrap();
        let Some(ControlMessageOwned::ScmRights(fds)) = message.cmsgs().unwrap().next() else {
            panic!("no descriptor came");
        };
        self.0.write_all(&(target.vpid as i32).to_ne_bytes()).unwrap();
        send(&self.0, fds[0]);
        nix::unistd::close(fds[0]).unwrap();
    }

    pub fn zombie(&mut self, vpid: i32) {
        self.0.write_all(&(-vpid).to_ne_bytes()).unwrap();
    }

    pub fn finish(mut self) {
        self.0.write_all(&0x5253_5446_i32.to_ne_bytes()).unwrap();
    }
}

fn send(socket: &UnixStream, fd: RawFd) {
    let rights = [fd];
    let control = [ControlMessage::ScmRights(&rights)];
    let parts = [IoSlice::new(&[0])];
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), None).unwrap();
}

fn bad(start: u64, pages: impl Iterator<Item = u64>, home: u64, vpid: u64) -> u64 {
    let wrong = pages.filter(|page| {
        let expected = content(vpid as u32, home + page * PAGE);
        let at = start + page * PAGE;
        sys::word(at) != expected || sys::word(at + PAGE - 8) != expected
    });
    wrong.count() as u64
}

#[test]
#[ignore = "the restored program, started by the other tests"]
fn program() {
    let commands = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned().unwrap();
    let mut answers = UnixStream::from(commands);
    let lines = BufReader::new(answers.try_clone().unwrap()).lines();
    let mut uffd = Some(sys::userfaultfd());
    for line in lines {
        let line = line.unwrap();
        let mut words = line.split_whitespace();
        let command = words.next().unwrap_or_default();
        let n: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        let answer = match command {
            "hand" => {
                send(&answers, uffd.take().unwrap().as_raw_fd());
                continue;
            }
            "map" => {
                sys::map(n[0], n[1]);
                sys::register(uffd.as_ref().unwrap().as_raw_fd(), n[0], n[1]);
                0
            }
            "check" => bad(n[0], 0..n[1], n[2], n[3]),
            "zero" => (0..n[1]).filter(|page| sys::word(n[0] + page * PAGE) != 0).count() as u64,
            "threads" => thread::scope(|scope| {
                let n = &n;
                let threads: Vec<_> = (0..6_u64)
                    .map(|t| {
                        // Every thread from its own corner, all of them over all pages.
                        let pages = (0..n[1]).map(move |i| (i * 97 + t * 31) % n[1]);
                        scope.spawn(move || bad(n[0], pages, n[2], n[3]))
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            }),
            "fork" => sys::in_fork(|| bad(n[0], 0..n[1], n[2], n[3])),
            "unmap" => {
                sys::unmap(n[0], n[1]);
                0
            }
            "dontneed" => {
                sys::dontneed(n[0], n[1]);
                0
            }
            "move" => {
                sys::remap(n[0], n[1], n[2]);
                0
            }
            other => panic!("{other}?"),
        };
        writeln!(answers, "{answer}").unwrap();
    }
}
