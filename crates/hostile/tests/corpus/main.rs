//! Every door with what is committed and with a few thousand mutations: what
//! `make fuzz` does at length, on every toolchain, in a few seconds. `TIMES=100`
//! tries a hundred times as many, others with another `SEED`.

mod sys;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use transship_hostile::{ENTRIES, Entry, Mutations};

#[global_allocator]
static COUNTING: sys::Counting = sys::Counting;

fn regressions(entry: &Entry) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/regressions");
    let Ok(files) = fs::read_dir(dir.join(entry.name)) else { return Vec::new() };
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// Runs it, and says what it was run with if it panics or takes too much.
fn try_one(entry: &Entry, what: &str, bytes: &[u8]) {
    let (outcome, peak) =
        sys::peak_of(|| std::panic::catch_unwind(|| (entry.run)(bytes)).map_err(|_| ()));
    let hex: String = bytes.iter().take(4096).map(|byte| format!("{byte:02x}")).collect();
    assert!(outcome.is_ok(), "{} panics on {what}: {hex}", entry.name);
    let most = entry.peak_bytes + 64 * bytes.len();
    assert!(peak <= most, "{} takes {peak} bytes of at most {most} for {what}: {hex}", entry.name);
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect(name))
}

/// One test, since what is allocated is counted for the whole process.
#[test]
fn no_bytes_break_a_promise() {
    for entry in ENTRIES {
        let began = Instant::now();
        let mut corpus = (entry.seeds)();
        assert!(!corpus.is_empty(), "{} has no seeds", entry.name);
        for (number, seed) in corpus.iter().enumerate() {
            try_one(entry, &format!("seed {number}"), seed);
        }
        for (path, bytes) in regressions(entry) {
            try_one(entry, &path.display().to_string(), &bytes);
            corpus.push(bytes);
        }
        let mut mutations = Mutations::new(number("SEED", 0x7472_616e_7368_6970));
        let count = entry.mutations as u64 * number("TIMES", 1);
        for number in 0..count {
            try_one(entry, &format!("mutation {number}"), &mutations.next(&corpus));
        }
        println!("{}: {count} runs in {:.1?}", entry.name, began.elapsed());
    }
}
