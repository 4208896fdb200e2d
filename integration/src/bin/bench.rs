//! What a migration costs, beside what others cost: `make bench`, and in under
//! four minutes `make bench-quick` (`--quick`). `docs/benchmarks.md` tells what
//! is measured and how.
//!
//! Contestants take turns, so that whatever else the machine does meets all of
//! them. Every move ends with a check of all memory, and the first that fails
//! ends the benchmark. The last line is JSON, unless loads of one's own are
//! measured: `bench --load 256@50 --runs 3`, with `--ours` for our moves alone.
#![forbid(unsafe_code)]

use std::{
    fs,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use transship_integration::{
    agents::Pair,
    bench::{
        Load, Move, Spread,
        bundle::Bundles,
        chart,
        criu::{self, Kind, Pipes},
        execs::Watch,
        ours::{self, Figures},
        raw,
    },
    bin_dir, target_dir,
};

const GIB: Load = Load { mib: 1024, rate: 0 };
const SMALL: Load = Load { mib: 256, rate: 0 };
const LARGE: Load = Load { mib: 4096, rate: 0 };

/// A quick run is to end within four minutes: it begins no round of moves that
/// would end later than this if it took as long as the longest before.
const QUICK: Duration = Duration::from_secs(225);
const RUNS: usize = 5;

/// Source, images on both sides, target, and something for everybody else.
const COPIES: usize = 4;

/// Where the report does not say how many there were.
const LANES: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contestant {
    Ours,
    StopAndCopy,
    Lazy,
}

impl Contestant {
    const ALL: [Self; 3] = [Self::Ours, Self::Lazy, Self::StopAndCopy];

    fn name(self) -> &'static str {
        match self {
            Self::Ours => "transship",
            Self::StopAndCopy => "B1 stop and copy",
            Self::Lazy => "B2 lazy pages",
        }
    }
}

/// What is asked for on the command line.
struct Options {
    quick: bool,
    runs: usize,
    /// Instead of the usual ones.
    loads: Vec<Load>,
    /// Nobody else moves them.
    ours: bool,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        const USAGE: &str =
            "usage: bench [--quick] [--runs N] [--ours] [--load MIB[@MIB_PER_S]]...";
        let mut options = Self { quick: false, runs: RUNS, loads: Vec::new(), ours: false };
        while let Some(word) = words.next() {
            let mut value = || words.next().context(USAGE);
            match word.as_str() {
                "--quick" => options.quick = true,
                "--ours" => options.ours = true,
                "--runs" => options.runs = value()?.parse().context(USAGE)?,
                "--load" => options.loads.push(value()?.parse()?),
                _ => bail!("{word}: {USAGE}"),
            }
        }
        ensure!(options.runs > 0, "no runs, no figures");
        ensure!(!options.ours || !options.loads.is_empty(), "--ours goes with --load");
        Ok(options)
    }

    /// Our moves of this load have a raw copy beside them.
    fn beside_raw(&self) -> Load {
        let first = self.loads.first().copied().unwrap_or(GIB);
        if self.loads.contains(&GIB) { GIB } else { first }
    }

    /// Who moves what.
    fn cases(&self) -> Vec<(Load, &'static [Contestant])> {
        const ALL: &[Contestant] = &Contestant::ALL;
        const OURS: &[Contestant] = &[Contestant::Ours];
        let every = |loads: &[Load]| loads.iter().map(|load| (*load, ALL)).collect();
        if self.ours {
            self.loads.iter().map(|load| (*load, OURS)).collect()
        } else if !self.loads.is_empty() {
            every(&self.loads)
        } else if self.quick {
            vec![(GIB, ALL), (SMALL, OURS), (LARGE, OURS)]
        } else {
            let writing = [50, 500].map(|rate| Load { rate, ..GIB });
            every(&[Load::idle(16), SMALL, GIB, LARGE, writing[0], writing[1]])
        }
    }
}

fn main() -> ExitCode {
    match Options::parse(std::env::args().skip(1)).and_then(|options| bench(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(options: &Options) -> Result<()> {
    let begun = Instant::now();
    let bin = bin_dir()?;
    if !bin.ends_with("release") {
        say(&format!("{} holds no release build; `make bench` makes one", bin.display()));
    }
    let mut arena = Arena::start()?;
    let mut longest = Duration::ZERO;
    for run in 0..options.runs {
        if options.quick && begun.elapsed() + longest > QUICK {
            say(&format!("{run} runs, by the clock"));
            break;
        }
        let round = Instant::now();
        for (load, contestants) in options.cases() {
            for turn in 0..contestants.len() {
                let contestant = contestants[(run + turn) % contestants.len()];
                let beside_raw = contestant == Contestant::Ours && load == options.beside_raw();
                // What came before leaves memory behind that is quickly had
                // again, or none: neither may always be the second.
                if beside_raw && run % 2 == 1 {
                    arena.copy_raw()?;
                }
                arena.run(load, contestant)?;
                if beside_raw && run % 2 == 0 {
                    arena.copy_raw()?;
                }
            }
        }
        longest = longest.max(round.elapsed());
    }
    let results = arena.results()?;
    print(&results);
    let dir = target_dir()?.join("bench");
    fs::create_dir_all(&dir)?;
    let name = if options.quick { "bench-quick" } else { "bench" };
    fs::write(dir.join(format!("{name}.json")), serde_json::to_vec_pretty(&results)?)?;
    fs::write(dir.join(format!("{name}.svg")), chart::svg(&groups(&results)))?;
    say(&format!("all runs and the chart: {}/{name}.{{json,svg}}", dir.display()));
    if options.loads.is_empty() {
        println!("{}", serde_json::to_string(&summary(&results)?)?);
    }
    Ok(())
}

// --- measuring -----------------------------------------------------------------

struct Arena {
    pair: Pair,
    bundles: Bundles,
    watch: Watch,
    moves: Vec<(Load, Contestant, Move)>,
    raw: Vec<f64>,
    _pipes: Pipes,
}

impl Arena {
    fn start() -> Result<Self> {
        let pipes = Pipes::widen()?;
        let watch = Watch::start()?;
        let pair = Pair::start()?;
        let bundles = Bundles::create(&pair.a)?;
        let mut arena =
            Self { pair, bundles, watch, moves: Vec::new(), raw: Vec::new(), _pipes: pipes };
        // The first ones fill caches: CRIU's of what the kernel can, images.
        for contestant in Contestant::ALL {
            arena.run(Load::idle(16), contestant)?;
        }
        arena.moves.clear();
        Ok(arena)
    }

    fn run(&mut self, load: Load, contestant: Contestant) -> Result<()> {
        let free = available()? >> 20;
        ensure!(
            free >= (load.mib * COPIES) as u64,
            "{free} MiB of memory are free, too few to move {}",
            load.name()
        );
        let Self { pair, bundles, watch, .. } = self;
        let stock = |kind| criu::migrate(kind, load, (&pair.a, &pair.b), bundles, watch);
        let moved = match contestant {
            Contestant::Ours => ours::migrate(load, pair, &[], watch),
            Contestant::StopAndCopy => stock(Kind::StopAndCopy),
            Contestant::Lazy => stock(Kind::Lazy),
        };
        let moved = moved.with_context(|| format!("{} with {}", contestant.name(), load.name()))?;
        say(&format!(
            "{:18} {:16} paused {:9.1} ms, all there after {:9.1} ms",
            contestant.name(),
            load.name(),
            moved.pause_ms,
            moved.total_ms
        ));
        self.moves.push((load, contestant, moved));
        Ok(())
    }

    fn copy_raw(&mut self) -> Result<()> {
        let mut ours = self.moves.iter().rev().filter(|(_, who, _)| *who == Contestant::Ours);
        let lanes = ours.find_map(|(_, _, moved)| Figures::of(moved).ok()?.lanes().ok());
        let lanes = lanes.filter(|lanes| *lanes > 0).unwrap_or(LANES);
        let rate = raw::copy(&self.pair.a, &self.pair.b, GIB.mib, lanes)?;
        say(&format!("B3 raw copy in {lanes} streams: {:.0} MB/s", rate / 1e6));
        self.raw.push(rate);
        Ok(())
    }

    /// Grouped by load and contestant, in the order of measurement.
    fn results(self) -> Result<Results> {
        let mut cases: Vec<Case> = Vec::new();
        for (load, contestant, moved) in self.moves {
            let known =
                cases.iter_mut().find(|c| c.load == load && c.contestant == contestant.name());
            match known {
                Some(case) => case.moves.push(moved),
                None => cases.push(Case {
                    load,
                    name: load.name(),
                    contestant: contestant.name(),
                    pause_ms: None,
                    own_ms: None,
                    total_ms: None,
                    moves: vec![moved],
                }),
            }
        }
        for case in &mut cases {
            case.pause_ms = Some(case.spread(|moved| moved.pause_ms)?);
            case.total_ms = Some(case.spread(|moved| moved.total_ms)?);
            case.own_ms = Spread::of(case.moves.iter().filter_map(|moved| moved.own_ms)).ok();
        }
        Ok(Results { cases, raw_bytes_per_second: Spread::of(self.raw.clone())?, raw: self.raw })
    }
}

fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).context("MemAvailable")?;
    Ok(kib.parse::<u64>()? << 10)
}

// --- telling -------------------------------------------------------------------

#[derive(Serialize)]
struct Results {
    cases: Vec<Case>,
    raw_bytes_per_second: Spread,
    /// One for each of our moves of the load that it was measured beside.
    raw: Vec<f64>,
}

#[derive(Serialize)]
struct Case {
    load: Load,
    name: String,
    contestant: &'static str,
    pause_ms: Option<Spread>,
    own_ms: Option<Spread>,
    total_ms: Option<Spread>,
    moves: Vec<Move>,
}

impl Case {
    fn spread(&self, figure: impl Fn(&Move) -> f64) -> Result<Spread> {
        Spread::of(self.moves.iter().map(figure))
    }

    fn median(&self, figure: impl Fn(&Move) -> Result<f64>) -> Result<f64> {
        let figures = self.moves.iter().map(figure).collect::<Result<Vec<_>>>()?;
        Ok(Spread::of(figures)?.median)
    }
}

impl Results {
    fn case(&self, load: Load, contestant: Contestant) -> Result<&Case> {
        let name = contestant.name();
        let found = self.cases.iter().find(|c| c.load == load && c.contestant == name);
        found.with_context(|| format!("{name} has not moved {}", load.name()))
    }

    fn pause(&self, load: Load, contestant: Contestant) -> Result<f64> {
        Ok(self.case(load, contestant)?.spread(|moved| moved.pause_ms)?.median)
    }
}

fn groups(results: &Results) -> Vec<chart::Group> {
    let mut groups: Vec<chart::Group> = Vec::new();
    for contestant in Contestant::ALL {
        for case in results.cases.iter().filter(|case| case.contestant == contestant.name()) {
            let Some(pause) = case.pause_ms else { continue };
            let bar = chart::Bar { name: case.contestant, pause };
            match groups.iter_mut().find(|group| group.name == case.name) {
                Some(group) => group.bars.push(bar),
                None => groups.push(chart::Group { name: case.name.clone(), bars: vec![bar] }),
            }
        }
    }
    groups
}

fn print(results: &Results) {
    println!(
        "{:16} {:18} {:>28} {:>12} {:>12}",
        "", "", "pause in ms (all runs)", "own count", "all there"
    );
    for case in &results.cases {
        let (Some(pause), Some(total)) = (case.pause_ms, case.total_ms) else { continue };
        let all = format!("{:.1} ({:.1} - {:.1})", pause.median, pause.least, pause.most);
        let own = case.own_ms.map_or(String::new(), |own| format!("{:.1}", own.median));
        println!(
            "{:16} {:18} {all:>28} {own:>12} {:>12.1}",
            case.name, case.contestant, total.median
        );
    }
    let raw = results.raw_bytes_per_second;
    println!(
        "{:16} {:18} {:>28}",
        "1 GiB",
        "B3 raw copy",
        format!("{:.0} ({:.0} - {:.0}) MB/s", raw.median / 1e6, raw.least / 1e6, raw.most / 1e6)
    );
}

/// The last line; fields in the order they are read. All are ratios of medians
/// but the throughput, which is the median of what each pair of neighbours
/// had, and the execs, of which the worst run counts.
#[derive(Serialize)]
struct Summary {
    pause_ratio_1g_b1: f64,
    pause_ratio_1g_b2: f64,
    pause_4g_over_256m: f64,
    execs_in_pause: usize,
    wire_over_needed: f64,
    throughput_over_b3: f64,
    predict_error_pct: f64,
}

fn summary(results: &Results) -> Result<Summary> {
    let pause = results.pause(GIB, Contestant::Ours)?;
    let ours = results.cases.iter().filter(|c| c.contestant == Contestant::Ours.name());
    let moves: Vec<_> = ours.flat_map(|case| &case.moves).collect();
    let gib = results.case(GIB, Contestant::Ours)?;
    let errors = moves.iter().map(|moved| Figures::of(moved)?.predict_error_pct());
    let errors = errors.collect::<Result<Vec<_>>>().context("predict_error_pct")?;
    let wire = gib.median(|moved| Figures::of(moved)?.wire_over_needed(moved));
    let rates = gib.moves.iter().map(|moved| Figures::of(moved)?.throughput());
    let rates = rates.collect::<Result<Vec<_>>>().context("throughput_over_b3")?;
    let over_raw = rates.iter().zip(&results.raw).map(|(ours, raw)| ours / raw);
    Ok(Summary {
        pause_ratio_1g_b1: rounded(pause / results.pause(GIB, Contestant::StopAndCopy)?),
        pause_ratio_1g_b2: rounded(pause / results.pause(GIB, Contestant::Lazy)?),
        pause_4g_over_256m: rounded(
            results.pause(LARGE, Contestant::Ours)? / results.pause(SMALL, Contestant::Ours)?,
        ),
        execs_in_pause: moves.iter().map(|moved| moved.execs.len()).max().unwrap_or_default(),
        wire_over_needed: rounded(wire.context("wire_over_needed")?),
        throughput_over_b3: rounded(Spread::of(over_raw)?.median),
        predict_error_pct: rounded(Spread::of(errors)?.median),
    })
}

/// Four digits say enough, and more would claim too much.
fn rounded(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

fn say(text: &str) {
    eprintln!("bench: {text}");
}
