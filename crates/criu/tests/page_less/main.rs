//! A dump without pages, completed and restored by the installed CRIU.
//!
//! Its own `main`, because the process that is moved is this program under
//! another argument, and must have nothing of a test runner in it.

mod server;
mod sys;
mod target;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env, fs,
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use server::Memory;
use transship_criu::{Hider, images::MemoryDir, pages};
use transship_types::{PAGE, PageRange, PageSet};

const DEADLINE: Duration = Duration::from_secs(30);

/// Bits of a pagemap entry.
const PRESENT_OR_SWAPPED: u64 = 3 << 62;
const OF_A_FILE: u64 = 1 << 61;
const GUARD: u64 = 1 << 58;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().collect();
    if let [_, verb, dir] = arguments.as_slice()
        && verb == "target"
    {
        target::run(Path::new(dir));
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    println!("\nrunning 1 test");
    match a_process_comes_back_with_every_page() {
        Ok(()) => {
            println!("test a_process_comes_back_with_every_page ... ok\n");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("test a_process_comes_back_with_every_page ... FAILED\n{error:?}\n");
            ExitCode::FAILURE
        }
    }
}

fn a_process_comes_back_with_every_page() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut tree = Tree::start(dir.path())?;
    let sums = tree.sums("before", dir.path())?;
    let guards: Vec<PageSet> =
        tree.pids.iter().map(|&pid| pages::guards(pid)).collect::<Result<_, _>>()?;
    if guards.iter().all(PageSet::is_empty) {
        println!("note: this kernel tells of no guard regions; they are not tested");
    }
    let mappings: Vec<Mappings> =
        tree.pids.iter().map(|&pid| mappings(pid)).collect::<Result<_>>()?;
    let copies: HashMap<u32, Memory> = tree
        .pids
        .iter()
        .map(|&pid| Ok((pid as u32, copy_of(pid).context("copying the memory")?)))
        .collect::<Result<_>>()?;

    let images = MemoryDir::create(None)?;
    dump(&tree, &images)?;
    tree.reap()?;
    let saved: u64 = images.files()?.iter().map(|(_, bytes)| bytes).sum();
    // The shared memory is CRIU's to save, as before.
    let limit = target::SHARED as u64 + (1 << 20);
    ensure!(saved < limit, "the images have {saved} bytes");

    let layouts = pages::layout(&images)?;
    ensure!(layouts.len() == tree.pids.len(), "{layouts:?}");
    let mut lazy = HashMap::new();
    for process in &layouts {
        let index = tree.pids.iter().position(|&pid| pid as u32 == process.vpid);
        pages::add_guards(&images, process.vpid, &guards[index.context("another process")?])?;
        let copy = &copies[&process.vpid];
        let present: PageSet = copy.keys().map(|&page| range_of(page)).collect();
        let mut fetch = |range: PageRange, into: &mut [u8]| {
            for (index, page) in into.chunks_mut(PAGE as usize).enumerate() {
                page.copy_from_slice(&copy[&(range.start() + index as u64 * PAGE)]);
            }
            Ok(())
        };
        let done = pages::complete(&images, process, &present, &mut fetch)?;
        ensure!(done.unplaced_pages <= 1, "{} pages have no place", done.unplaced_pages);
        // Locked memory, written pages of a file, and pages of the stack.
        ensure!(done.eager_pages as usize >= (target::LOCKED + target::FILE / 2) / PAGE as usize);
        ensure!(done.lazy.pages() as usize >= (target::ANONYMOUS / PAGE as usize));
        lazy.insert(process.vpid, done.lazy);
    }

    let work = tempfile::tempdir()?;
    let server = server::start(work.path(), copies, lazy)?;
    restore(&tree, &images, work.path())?;
    ensure!(tree.sums("after", dir.path())? == sums, "the memory is not what it was");
    for (pid, before) in tree.pids.iter().zip(&guards) {
        ensure!(pages::guards(*pid)? == *before, "the guard regions are not what they were");
    }
    for (number, (pid, before)) in tree.pids.iter().zip(mappings).enumerate() {
        let after = self::mappings(*pid)?;
        for ((start, end), mut flags) in before {
            // What a child has as its parent does CRIU maps once, in the
            // parent, and a fork inherits no lock (fork(2)).
            if number > 0 {
                flags.remove("lo");
            }
            let whole = after.range(..=(start, u64::MAX)).next_back();
            let whole = whole.filter(|((_, within), _)| end <= *within);
            let mut now = whole.map(|(_, now)| now.clone());
            if let Some(now) = now.as_mut().filter(|_| number > 0) {
                now.remove("lo");
            }
            ensure!(
                now.as_ref() == Some(&flags),
                "{start:x}-{end:x} of {pid} was {flags:?} and is {now:?}"
            );
        }
    }
    ensure!(server.served() > 0, "no page came through the server");
    Ok(())
}

fn range_of(page: u64) -> PageRange {
    PageRange::of_pages(page, 1).expect("a page")
}

/// The processes, killed at the end however the test ends.
struct Tree {
    pids: Vec<i32>,
    child: Child,
    /// Keeps a mount namespace that CRIU shares with them: it saves and
    /// restores no mounts then.
    keeper: Child,
}

fn inside(keeper: &Child) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--mount=/proc/{}/ns/mnt", keeper.id()));
    command
}

impl Tree {
    fn start(dir: &Path) -> Result<Self> {
        let mut keeper = Command::new("unshare");
        keeper.args(["--mount", "--propagation", "slave", "sh", "-c", "echo; exec sleep 600"]);
        let mut keeper = keeper.stdout(Stdio::piped()).spawn()?;
        keeper.stdout.as_mut().context("no stdout")?.read_exact(&mut [0])?;
        let mut command = inside(&keeper);
        command.arg(env::current_exe()?).arg("target").arg(dir).stdin(Stdio::null());
        let child = command.stdout(Stdio::null()).spawn()?;
        let mut tree = Self { pids: vec![child.id() as i32], child, keeper };
        let forked = || fs::read_to_string(dir.join("child")).ok()?.parse().ok();
        tree.pids.push(wait_for("the target", forked)?);
        tree.pids.iter().try_for_each(|pid| {
            let ready = dir.join(format!("ready-{pid}"));
            wait_for("the target", || ready.exists().then_some(()))
        })?;
        Ok(tree)
    }

    /// What each process says of its memory.
    fn sums(&self, when: &str, dir: &Path) -> Result<Vec<String>> {
        let mut sums = Vec::new();
        for pid in &self.pids {
            let path = dir.join(format!("sum-{pid}"));
            let _ = fs::remove_file(&path);
            kill(Pid::from_raw(*pid), Signal::SIGUSR1).with_context(|| format!("{when}: {pid}"))?;
            sums.push(wait_for("a sum", || fs::read_to_string(&path).ok())?);
        }
        Ok(sums)
    }

    /// After CRIU has killed them the pids must be free.
    fn reap(&mut self) -> Result<()> {
        self.child.wait()?;
        let second = self.pids[1];
        wait_for("the end of the child", || {
            (!Path::new(&format!("/proc/{second}")).exists()).then_some(())
        })
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        for pid in &self.pids {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        let _ = self.child.wait();
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited in vain for {what}");
        }
        sleep(Duration::from_millis(5));
    }
}

/// Every private page a process has.
fn copy_of(pid: i32) -> Result<Memory> {
    let pagemap = fs::File::open(format!("/proc/{pid}/pagemap"))?;
    let memory = fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut copy = Memory::new();
    for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        let mut words = line.split_whitespace();
        let (range, rights) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let kernels = line.ends_with(']') && line.contains("[v");
        if !rights.ends_with('p') || kernels {
            continue;
        }
        let (start, end) = range.split_once('-').context("a mapping")?;
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        let mut entries = vec![0; ((end - start) / PAGE * 8) as usize];
        pagemap.read_exact_at(&mut entries, start / PAGE * 8)?;
        for (index, entry) in entries.chunks(8).enumerate() {
            let entry = u64::from_ne_bytes(entry.try_into()?);
            if entry & PRESENT_OR_SWAPPED == 0 || entry & (OF_A_FILE | GUARD) != 0 {
                continue;
            }
            let page = start + index as u64 * PAGE;
            let mut bytes = vec![0; PAGE as usize];
            memory.read_exact_at(&mut bytes, page)?;
            copy.insert(page, bytes);
        }
    }
    Ok(copy)
}

/// By their ends.
type Mappings = BTreeMap<(u64, u64), BTreeSet<String>>;

/// What of the flags of its mappings shall stay as it is, from the kernel's
/// own list. Mappings that are alike may become one.
fn mappings(pid: i32) -> Result<Mappings> {
    let kept = ["gd", "lo", "nr", "sr", "rr", "dc", "wf", "dd", "hg", "nh"];
    let mut mappings = Mappings::new();
    let mut range = None;
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            // The kernel's own pages come from the kernel.
            let own = line.ends_with(']') && line.contains("[v");
            let ends = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
            range = (!own).then_some(ends);
        } else if let (Some(flags), Some(range)) = (line.strip_prefix("VmFlags:"), range) {
            let flags = flags.split_whitespace().filter(|flag| kept.contains(flag));
            mappings.insert(range, flags.map(Into::into).collect());
        }
    }
    let found: BTreeSet<_> = mappings.values().flatten().collect();
    ensure!(found.len() > 5, "the process has only {found:?}");
    Ok(mappings)
}

/// By a CRIU that sees no page.
fn dump(tree: &Tree, images: &MemoryDir) -> Result<()> {
    let path = images.path();
    let hidden = Hider::prepare(tree.keeper.id() as i32)?.hide(&tree.pids)?;
    if hidden.listed() == 0 {
        println!("note: CRIU reads the kernel's list of mappings; ours is not tested");
    }
    let mut criu = inside(&tree.keeper);
    criu.args(["criu", "dump", "-v4", "-o", "dump.log", "-t"]).arg(tree.pids[0].to_string());
    let status = criu.arg("-D").arg(&path).status()?;
    drop(hidden);
    ensure!(status.success(), "the dump failed:\n{}", errors(path.join("dump.log")));
    fs::remove_file(path.join("dump.log"))?;
    Ok(())
}

fn restore(tree: &Tree, images: &MemoryDir, work: &Path) -> Result<()> {
    let status = inside(&tree.keeper)
        .args([
            "criu",
            "restore",
            "-v4",
            "-o",
            "restore.log",
            "--lazy-pages",
            "--restore-detached",
            "-D",
        ])
        .arg(images.path())
        .arg("-W")
        .arg(work)
        .status()?;
    ensure!(status.success(), "the restore failed:\n{}", errors(work.join("restore.log")));
    Ok(())
}

fn errors(log: PathBuf) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines().filter(|line| line.contains("Error")).collect::<Vec<_>>().join("\n")
}
