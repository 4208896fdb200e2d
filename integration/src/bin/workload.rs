//! Memory under load, for tests and benchmarks of a migration: pages whose
//! content follows from (page, version), a known rate of writing, clocks that
//! notice a pause, and a check of every page on demand.
//!
//! ```text
//! workload [--mib N] [--processes P] [--threads T] [--rate MIB_PER_S] [--window MIB]
//! ```
//!
//! N MiB are divided over P processes of T threads each. `--rate` is how much
//! all of them together write in a second, page by page, all over the memory
//! or within the first `--window` MiB of it. Every thread also reads and
//! checks one page in a millisecond, as a server would that answers somebody.
//!
//! It is driven by files, because they survive a migration: write
//! `NUMBER VERB` to `/workload/command` (elsewhere first, then rename it) and
//! read `/workload/answer-NUMBER`, one line of JSON. `/workload/ready` appears
//! once all memory is filled. `transship_integration::workload` does this for
//! the harness.
//!
//! | Verb | Does | Answer |
//! |---|---|---|
//! | `verify` | checks every word of every page | `pages`, `bad`, `first_bad`, `lost_writes` |
//! | `stats` | | `pages`, `dirtied` (since the start), `probed`, `probed_bad` |
//! | `rate MIB [WINDOW_MIB]` | another rate of writing | `ok` |
//! | `reset` | forgets the gaps seen so far | `ok` |
//! | `gaps` | | `ticker`: the longest gaps, longest first; `client`: the longest between two reads of a thread |
//!
//! A gap is `{"start_ns", "gap_ns"}`, of CLOCK_REALTIME. The ticker looks at that
//! clock every 100 µs. No other clock will do: CRIU restores into a time
//! namespace in which the monotonic ones go on where the dump read them, so that
//! most of a pause never happened by them.
#![forbid(unsafe_code)]

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

const DIR: &str = "/workload";
const TICK: Duration = Duration::from_micros(100);
/// A thread's rhythm of writing and reading.
const STEP: Duration = Duration::from_millis(1);
/// How often the command file is looked for.
const LOOK: Duration = Duration::from_millis(5);
/// Gaps that are remembered.
const LONGEST: usize = 16;
/// After a pause a thread does not make up for what it would have written in
/// the meantime, as a server does not for requests that never came.
const LATE: Duration = Duration::from_millis(20);

fn main() -> io::Result<()> {
    let options = Options::parse(env::args().skip(1))?;
    let share = Share::start(&options);
    if options.worker {
        return work(&share);
    }
    let mut others = Vec::new();
    for number in 1..options.processes {
        others.push(Other::start(&options, number)?);
    }
    // Orders are taken when the memory is filled.
    share.obey("stats");
    for other in &mut others {
        other.ask("stats")?;
    }
    let ticker = Ticker::start();
    fs::write(Path::new(DIR).join("ready"), "")?;
    loop {
        thread::sleep(LOOK);
        let Ok(text) = fs::read_to_string(Path::new(DIR).join("command")) else { continue };
        fs::remove_file(Path::new(DIR).join("command"))?;
        let (number, verb) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        let mut answer = share.obey(verb);
        for other in &mut others {
            answer.merge(other.ask(verb)?);
        }
        if verb == "reset" {
            ticker.reset();
        }
        answer.ticker = ticker.longest();
        let (new, done) = (format!("{DIR}/.answer"), format!("{DIR}/answer-{number}"));
        fs::write(&new, serde_json::to_vec(&answer)?)?;
        fs::rename(new, done)?;
    }
}

struct Options {
    mib: usize,
    processes: usize,
    threads: usize,
    rate: f64,
    window: f64,
    worker: bool,
    number: usize,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> io::Result<Self> {
        let mut options = Self {
            mib: 16,
            processes: 1,
            threads: 1,
            rate: 0.0,
            window: 0.0,
            worker: false,
            number: 0,
        };
        while let Some(name) = words.next() {
            let wrong = || io::Error::other(format!("workload: {name} with no good value"));
            let value = words.next().ok_or_else(wrong)?;
            let number = || value.parse::<usize>().map_err(|_| wrong());
            match name.as_str() {
                "--mib" => options.mib = number()?,
                "--processes" => options.processes = number()?.max(1),
                "--threads" => options.threads = number()?.max(1),
                "--rate" => options.rate = value.parse().map_err(|_| wrong())?,
                "--window" => options.window = value.parse().map_err(|_| wrong())?,
                "--worker" => (options.worker, options.number) = (true, number()?),
                _ => return Err(wrong()),
            }
        }
        Ok(options)
    }

    fn everywhere(&self) -> usize {
        self.processes * self.threads
    }
}

// --- pages -------------------------------------------------------------------

const WORDS: usize = 512;

/// Words that carry the version, one in every this many; the others are of
/// version 0 for ever. A page that arrives in pieces of two versions shows.
const VERSIONED: usize = 64;

#[repr(C, align(4096))]
struct Page([u64; WORDS]);

/// What word `index` of a page holds: noise that does not compress.
fn word(page: u64, version: u64, index: usize) -> u64 {
    let version = if index.is_multiple_of(VERSIONED) { version } else { 0 };
    let mut x = page
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(version.wrapping_mul(0xd1b5_4a32_d192_ed03))
        .wrapping_add((index as u64).wrapping_mul(0x8cb9_2ba7_2f3d_8dd7));
    x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1
}

impl Page {
    fn new(number: u64) -> Self {
        Self(std::array::from_fn(|index| word(number, 0, index)))
    }

    fn write(&mut self, number: u64, version: u64) {
        for index in (0..WORDS).step_by(VERSIONED) {
            self.0[index] = word(number, version, index);
        }
    }

    fn holds(&self, number: u64, version: u64) -> bool {
        self.0.iter().enumerate().all(|(index, &is)| is == word(number, version, index))
    }
}

// --- one thread and its memory -------------------------------------------------

enum Order {
    Verify,
    Stats,
    Rate { mib: f64, window_mib: f64 },
    Reset,
    Gaps,
}

struct Part {
    /// Number of the first page among all pages of all threads.
    first: u64,
    pages: Vec<Page>,
    versions: Vec<u32>,
    /// Writes made: the sum of all versions.
    dirtied: u64,
    writer: Writer,
    probed: u64,
    probed_bad: u64,
    client: Gap,
    random: u64,
}

/// Which pages are written, and when.
struct Writer {
    /// Pages in a second.
    rate: f64,
    window: usize,
    /// From one page to the next; has no divisor in common with `window`.
    stride: usize,
    next: usize,
    since: Instant,
    owed: f64,
}

impl Writer {
    fn new(mib_per_second: f64, window_mib: f64, pages: usize) -> Self {
        let window = (window_mib * 256.0) as usize;
        let window = if window == 0 { pages } else { window.min(pages) }.max(1);
        let mut stride = (window * 5 / 8) | 1;
        while common_divisor(stride, window) != 1 {
            stride += 2;
        }
        let rate = if pages == 0 { 0.0 } else { mib_per_second * 256.0 };
        Self { rate, window, stride, next: 0, since: Instant::now(), owed: 0.0 }
    }

    /// Pages to be written by now.
    fn due(&mut self) -> usize {
        let passed = self.since.elapsed().min(LATE);
        self.since = Instant::now();
        self.owed += self.rate * passed.as_secs_f64();
        let due = self.owed as usize;
        self.owed -= due as f64;
        due
    }

    /// All over the window, and each page of it once before any is a second time.
    fn choose(&mut self) -> usize {
        self.next = (self.next + self.stride) % self.window;
        self.next
    }
}

fn common_divisor(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl Part {
    fn new(first: u64, pages: usize, rate: f64, window: f64) -> Self {
        let mut all = Vec::with_capacity(pages);
        all.extend((0..pages as u64).map(|page| Page::new(first + page)));
        Self {
            first,
            pages: all,
            versions: vec![0; pages],
            dirtied: 0,
            // Only now: nothing is owed for the time of filling.
            writer: Writer::new(rate, window, pages),
            probed: 0,
            probed_bad: 0,
            client: Gap::default(),
            random: first + 1,
        }
    }

    fn run(mut self, orders: &Receiver<(Order, Sender<Answer>)>) {
        let mut last = now();
        loop {
            match orders.recv_timeout(STEP) {
                Ok((order, answer)) => {
                    let _ = answer.send(self.obey(order));
                    // What an order takes is no pause.
                    last = now();
                }
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            for _ in 0..self.writer.due() {
                let page = self.writer.choose();
                self.versions[page] += 1;
                self.pages[page].write(self.first + page as u64, self.versions[page].into());
                self.dirtied += 1;
            }
            self.probe();
            let time = now();
            self.client = self.client.max(Gap::between(last, time));
            last = time;
        }
    }

    /// Reads one page anywhere.
    fn probe(&mut self) {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        if let Some(page) = ((self.random >> 33) as usize).checked_rem(self.pages.len()) {
            self.probed += 1;
            self.probed_bad += u64::from(!self.is_good(page));
        }
    }

    fn is_good(&self, page: usize) -> bool {
        self.pages[page].holds(self.first + page as u64, self.versions[page].into())
    }

    fn obey(&mut self, order: Order) -> Answer {
        let mut answer = Answer { pages: self.pages.len() as u64, ok: true, ..Answer::default() };
        match order {
            Order::Verify => {
                let bad: Vec<_> = (0..self.pages.len()).filter(|&p| !self.is_good(p)).collect();
                answer.bad = bad.len() as u64;
                answer.first_bad = bad.first().map(|&page| self.first + page as u64);
                let written: u64 = self.versions.iter().map(|&version| u64::from(version)).sum();
                answer.lost_writes = self.dirtied.abs_diff(written);
            }
            Order::Rate { mib, window_mib } => {
                self.writer = Writer::new(mib, window_mib, self.pages.len());
            }
            Order::Reset => self.client = Gap::default(),
            Order::Stats | Order::Gaps => {}
        }
        answer.dirtied = self.dirtied;
        (answer.probed, answer.probed_bad) = (self.probed, self.probed_bad);
        answer.client = self.client;
        answer
    }
}

// --- a process's threads -------------------------------------------------------

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Answer {
    ok: bool,
    pages: u64,
    bad: u64,
    first_bad: Option<u64>,
    lost_writes: u64,
    dirtied: u64,
    probed: u64,
    probed_bad: u64,
    client: Gap,
    ticker: Vec<Gap>,
}

impl Answer {
    fn merge(&mut self, other: Self) {
        self.ok &= other.ok;
        self.pages += other.pages;
        self.bad += other.bad;
        self.first_bad = self.first_bad.or(other.first_bad);
        self.lost_writes += other.lost_writes;
        self.dirtied += other.dirtied;
        self.probed += other.probed;
        self.probed_bad += other.probed_bad;
        self.client = self.client.max(other.client);
    }
}

/// The share of this process.
struct Share {
    threads: Vec<Sender<(Order, Sender<Answer>)>>,
    /// Threads of all processes: what a rate is divided by.
    everywhere: usize,
}

impl Share {
    fn start(options: &Options) -> Self {
        let everywhere = options.everywhere();
        let each = options.mib * 256 / everywhere;
        let window = options.window / everywhere as f64;
        let rate = options.rate / everywhere as f64;
        let threads = (0..options.threads).map(|thread| {
            let (orders, inbox) = mpsc::channel();
            let first = ((options.number * options.threads + thread) * each) as u64;
            thread::spawn(move || {
                Part::new(first, each, rate, window).run(&inbox);
            });
            orders
        });
        Self { threads: threads.collect(), everywhere }
    }

    fn obey(&self, verb: &str) -> Answer {
        let mut words = verb.split_whitespace();
        let name = words.next().unwrap_or_default();
        let mut number = || words.next().and_then(|word| word.parse::<f64>().ok());
        let (first, second) = (number(), number());
        let each = self.everywhere as f64;
        let mut all = Answer { ok: true, ..Answer::default() };
        for thread in &self.threads {
            let order = match (name, first) {
                ("verify", _) => Order::Verify,
                ("stats", _) => Order::Stats,
                ("reset", _) => Order::Reset,
                ("gaps", _) => Order::Gaps,
                ("rate", Some(rate)) => {
                    Order::Rate { mib: rate / each, window_mib: second.unwrap_or(0.0) / each }
                }
                _ => return Answer::default(),
            };
            all.merge(ask(thread, order));
        }
        all
    }
}

fn ask(thread: &Sender<(Order, Sender<Answer>)>, order: Order) -> Answer {
    let (to, answer) = mpsc::channel();
    let sent = thread.send((order, to));
    sent.ok().and_then(|()| answer.recv().ok()).unwrap_or_default()
}

/// A worker's life: one order in a line, one answer in a line.
fn work(share: &Share) -> io::Result<()> {
    for line in io::stdin().lines() {
        let mut answer = serde_json::to_string(&share.obey(&line?))?;
        answer.push('\n');
        io::stdout().write_all(answer.as_bytes())?;
    }
    Ok(())
}

/// Another process with its share.
struct Other {
    _process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Other {
    fn start(options: &Options, number: usize) -> io::Result<Self> {
        let mut process = Command::new(env::current_exe()?)
            .args(env::args().skip(1))
            .args(["--worker", &number.to_string()])
            .args(["--processes", &options.processes.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let orders = process.stdin.take().ok_or_else(gone)?;
        let answers = BufReader::new(process.stdout.take().ok_or_else(gone)?);
        Ok(Self { _process: process, orders, answers })
    }

    fn ask(&mut self, verb: &str) -> io::Result<Answer> {
        writeln!(self.orders, "{verb}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

// --- the clock -----------------------------------------------------------------

/// Compared by length first.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Gap {
    gap_ns: u64,
    start_ns: u64,
}

impl Gap {
    /// None if somebody has set the clock back.
    fn between(start_ns: u64, end_ns: u64) -> Self {
        Self { gap_ns: end_ns.saturating_sub(start_ns), start_ns }
    }
}

/// See above, why this clock.
fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_REALTIME);
    time.map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

#[derive(Clone)]
struct Ticker(Arc<Mutex<Vec<Gap>>>);

impl Ticker {
    fn start() -> Self {
        let ticker = Self(Arc::default());
        let ours = ticker.clone();
        thread::spawn(move || {
            let mut last = now();
            loop {
                thread::sleep(TICK);
                let time = now();
                ours.note(Gap::between(last, time));
                last = time;
            }
        });
        ticker
    }

    fn gaps(&self) -> MutexGuard<'_, Vec<Gap>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, gap: Gap) {
        let mut gaps = self.gaps();
        if gaps.len() < LONGEST || gaps.last().is_some_and(|least| gap > *least) {
            gaps.truncate(LONGEST - 1);
            gaps.push(gap);
            gaps.sort_unstable_by(|a, b| b.cmp(a));
        }
    }

    fn longest(&self) -> Vec<Gap> {
        self.gaps().clone()
    }

    fn reset(&self) {
        self.gaps().clear();
    }
}
