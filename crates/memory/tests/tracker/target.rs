//! The program that is watched, and how a test tells it what to do: a line
//! for each command over the socket that is its standard input, a line back.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::{fd::OwnedFd, unix::net::UnixStream, unix::process::CommandExt},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use transship_memory::{Tracker, Want};
use transship_types::{PAGE, PageRange, Space};

use crate::{random::Life, sys};

/// Longest wait for a state that comes by itself.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a test sees of it. Ends with the test.
pub struct Target {
    runner: Child,
    pid: i32,
    commands: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Target {
    pub fn start() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = Command::new("/proc/self/exe")
            .args(["--ignored", "--exact", "--nocapture", "target::program"])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let answers = BufReader::new(ours.try_clone().unwrap());
        let mut target = Self { runner: child, pid: 0, answers, commands: ours };
        target.pid = target.answer() as i32;
        target
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn space(&self) -> Space {
        space(self.pid())
    }

    /// Sends a command, which need not be answered (soon).
    pub fn tell(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
    }

    pub fn answer(&mut self) -> u64 {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let line = line.trim();
        line.parse().unwrap_or_else(|_| panic!("the watched program says {line:?}"))
    }

    pub fn ask(&mut self, command: &str) -> u64 {
        self.tell(command);
        self.answer()
    }

    /// New memory of this kind, with something in each page.
    pub fn map(&mut self, kind: &str, pages: u64) -> PageRange {
        self.try_map(kind, pages).expect("there is memory of this kind")
    }

    /// None if the kernel gives none of this kind.
    pub fn try_map(&mut self, kind: &str, pages: u64) -> Option<PageRange> {
        let at = self.ask(&format!("map {kind} {pages}"));
        let range = PageRange::of_pages(at, pages).ok().filter(|_| at != 0)?;
        self.write(range, 1);
        Some(range)
    }

    pub fn write(&mut self, range: PageRange, value: u64) {
        self.ask(&format!("write {} {} {value}", range.start(), range.pages()));
    }

    /// `verb`, the range, and more.
    pub fn to(&mut self, verb: &str, range: PageRange, more: u64) -> u64 {
        self.ask(&format!("{verb} {} {} {more}", range.start(), range.pages()))
    }

    pub fn tracker(&self) -> Tracker {
        tracker(self.pid(), Want::Best)
    }

    /// Stops it and everything it started.
    pub fn halt(&self) {
        let all_stopped = || {
            let pids = session(self.pid());
            let stopped = |&pid: &i32| threads(pid).iter().all(|state| *state == b'T');
            let all = pids.iter().all(stopped);
            if !all {
                pids.iter().for_each(|&pid| sys::kill(pid, libc::SIGSTOP));
            }
            all
        };
        // The first list may lack a child that was born before its parent
        // stopped. The second has it.
        until(|| all_stopped() && all_stopped());
    }

    pub fn go_on(&self) {
        for pid in session(self.pid()) {
            sys::kill(pid, libc::SIGCONT);
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        for pid in session(self.pid()) {
            sys::kill(pid, libc::SIGKILL);
        }
        let _ = self.runner.wait();
    }
}

pub fn tracker(pid: i32, want: Want) -> Tracker {
    Tracker::new(Box::new(move || Ok(session(pid))), want).unwrap()
}

pub fn space(pid: i32) -> Space {
    Space::Process(pid as u32)
}

pub fn until(mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < PATIENCE, "this state never came");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The process and all that descend from it, which share its session.
pub fn session(leader: i32) -> Vec<i32> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Some(stat) = stat(&format!("/proc/{pid}/stat")) else { continue };
        // state, ppid, pgrp, session
        if stat[0] != "Z" && stat[3] == leader.to_string() {
            pids.push(pid);
        }
    }
    pids
}

/// The states of all threads.
pub fn threads(pid: i32) -> Vec<u8> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| stat(task.path().join("stat").to_str()?))
        .map(|stat| stat[0].as_bytes()[0])
        .filter(|state| !b"ZX".contains(state))
        .collect()
}

/// The fields after the name.
fn stat(path: &str) -> Option<Vec<String>> {
    let stat = String::from_utf8_lossy(&fs::read(path).ok()?).into_owned();
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// How many mappings a userfaultfd watches.
pub fn watched_mappings(pid: i32) -> usize {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.filter(|flags| flags.split_whitespace().any(|flag| flag == "uw" || flag == "um")).count()
}

/// The descriptors, with what they are.
pub fn descriptors(pid: i32) -> Vec<(String, String)> {
    let mut descriptors: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let link = fs::read_link(entry.path()).ok()?;
            Some((entry.file_name().into_string().unwrap(), link.to_str().unwrap().to_owned()))
        })
        .collect();
    descriptors.sort();
    descriptors
}

/// Says that [`program`] is what came of one that was there before.
const AGAIN: &str = "TRANSSHIP_TEST_PROGRAM";

/// The seed and depth of a life that goes on in a new program.
const LIFE: &str = "TRANSSHIP_TEST_LIFE";

/// Lives on as another program, with nothing of this one's memory.
pub fn live_again(seed: u64, depth: u32) -> std::io::Error {
    let own = std::env::args().skip(1);
    Command::new("/proc/self/exe").args(own).env(LIFE, format!("{seed} {depth}")).exec()
}

/// Not a test: what [`Target::start`] runs. A test has a thread of its own; the
/// program is a child, which has no other.
#[test]
#[ignore = "the program that the other tests watch"]
fn program() {
    if let Some(life) = std::env::var_os(LIFE) {
        let (seed, depth) = life.to_str().unwrap().split_once(' ').unwrap();
        Life::new(seed.parse().unwrap(), depth.parse().unwrap()).run();
    }
    if std::env::var_os(AGAIN).is_none() {
        if let Some(child) = sys::fork().unwrap() {
            return sys::wait(child);
        }
        sys::end_with_parent();
        sys::new_session();
    }
    let fd = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned().unwrap();
    let mut socket = UnixStream::from(fd);
    writeln!(socket, "{}", std::process::id()).unwrap();
    let mut life = Life::new(0, 0);
    for line in BufReader::new(socket.try_clone().unwrap()).lines() {
        let Ok(line) = line else { break };
        let mut words = line.split(' ');
        let verb = words.next().unwrap();
        let words: Vec<&str> = words.collect();
        match obey(verb, &words, &mut life) {
            Ok(answer) => writeln!(socket, "{answer}").unwrap(),
            Err(error) => writeln!(socket, "{line}: {error}").unwrap(),
        }
    }
    std::process::exit(0);
}

fn obey(verb: &str, words: &[&str], life: &mut Life) -> std::io::Result<u64> {
    let number = |index: usize| words[index].parse::<u64>().unwrap() as usize;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let mut answer = 0;
    match verb {
        "map" => {
            let pages = number(1);
            answer = match words[0] {
                "anonymous" => sys::map(pages, both, anonymous, -1)?,
                "huge" => sys::map(pages, both, anonymous | libc::MAP_HUGETLB, -1).unwrap_or(0),
                "code" => sys::map(pages, both | libc::PROT_EXEC, anonymous, -1)?,
                "locked" => sys::map(pages, both, anonymous | libc::MAP_LOCKED, -1)?,
                "shared" => sys::map(pages, both, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)?,
                "file" => {
                    let file = tempfile::tempfile()?;
                    file.set_len(pages as u64 * PAGE)?;
                    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
                    sys::map(pages, both, libc::MAP_PRIVATE, fd)?
                }
                // Aligned to where the kernel may use a page of 2 MiB.
                "thp" => {
                    let huge = (2 << 20) / sys::PAGE;
                    let at = sys::map(pages + huge, both, anonymous, -1)?;
                    let aligned = at.next_multiple_of(2 << 20);
                    sys::advise(aligned, pages, libc::MADV_HUGEPAGE)?;
                    aligned
                }
                other => panic!("no kind {other}"),
            } as u64;
        }
        "write" => sys::write(number(0), number(1), number(2) as u64),
        "look" => answer = sys::look(number(0), number(1)),
        "unmap" => sys::unmap(number(0), number(1))?,
        "remap" => answer = sys::remap(number(0), number(1), number(2))? as u64,
        "protect" => sys::protect(number(0), number(1), number(2) as i32)?,
        "advise" => sys::advise(number(0), number(1), number(2) as i32)?,
        "fork" => match sys::fork()? {
            Some(pid) => answer = pid as u64,
            None => {
                sys::write(number(0), number(1), number(2) as u64);
                loop {
                    thread::park();
                }
            }
        },
        "exec" => {
            let own = std::env::args().skip(1);
            return Err(Command::new("/proc/self/exe").args(own).env(AGAIN, "1").exec());
        }
        "stack" => answer = deep(number(0) as u64),
        "threads" => {
            let (at, threads) = (number(0), number(1));
            for thread in 0..threads {
                thread::spawn(move || {
                    for value in 0.. {
                        sys::write(at + thread * sys::PAGE, 1, value);
                    }
                });
            }
        }
        "sleep" => {
            let begin = Instant::now();
            thread::sleep(Duration::from_millis(number(0) as u64));
            answer = begin.elapsed().as_millis() as u64;
        }
        "vfork" => sys::vfork_until_read()?,
        "count" => sys::count(libc::SIGRTMIN() + 1),
        "counted" => answer = sys::counted(),
        "live" => *life = Life::new(number(0) as u64, 0),
        "steps" => {
            for _ in 0..number(0) {
                let _ = life.step();
            }
        }
        "forbid" => sys::forbid()?,
        "uffd" => sys::own_userfaultfd(number(0), number(1))?,
        "descriptors" => sys::use_up_descriptors(),
        other => panic!("no verb {other}"),
    }
    Ok(answer)
}

/// Uses up some pages of the stack.
pub fn deep(pages: u64) -> u64 {
    let page = [pages; 512];
    if pages == 0 { 0 } else { std::hint::black_box(page)[7] - pages + deep(pages - 1) }
}
