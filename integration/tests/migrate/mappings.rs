//! What the kernel does with a mapping moves with it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};
use transship_integration::{agents::Site, images::Image, until};

use crate::world::{World, read, with_agents};

const ID: &str = "mappings";
const PROGRAM: &str = include_str!("mappings.py");
/// In /proc/PID/smaps: grows down, locked, not reserved, read in order or
/// anywhere, not copied by fork or wiped, not in core files, huge or not.
const KEPT: [&str; 10] = ["gd", "lo", "nr", "sr", "rr", "dc", "wf", "dd", "hg", "nh"];

type Mappings = BTreeMap<(u64, u64), BTreeSet<String>>;

/// The flags of what the first process has mapped itself, by ends.
fn mappings(site: &Site) -> Result<Mappings> {
    let text = std::fs::read_to_string(site.path(format!("/proc/{}/smaps", site.task_pid(ID)?)))?;
    let mut mappings = Mappings::new();
    let mut range = None;
    for line in text.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let ends = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
            range = (!line.contains("[v")).then_some(ends);
        } else if let (Some(flags), Some(range)) = (line.strip_prefix("VmFlags:"), range) {
            let flags = flags.split_whitespace().filter(|flag| KEPT.contains(flag));
            mappings.insert(range, flags.map(Into::into).collect());
        }
    }
    Ok(mappings)
}

/// Waits until so many children more have looked at their memory; none may
/// have found what it should not.
fn children(site: &Site, more: u64) -> Result<u64> {
    let number = |name: &str| read(site, ID, name).ok().and_then(|text| text.trim().parse().ok());
    let before: u64 = number("/children").unwrap_or_default();
    let now = until("children that look at their memory", || {
        Ok(number("/children").filter(|now| *now >= before + more))
    })?;
    ensure!(number("/wrong") == Some(0), "{:?} looks found something else", number("/wrong"));
    Ok(now)
}

#[test]
fn flags_of_mappings_stay_and_a_child_sees_what_it_may() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        world.start_of(a, Image::Python, ID, &[], &["python3", "-c", PROGRAM])?;
        children(a, 2)?;
        let before = mappings(a)?;
        let flags: BTreeSet<_> = before.values().flatten().cloned().collect();
        ensure!(flags.len() == KEPT.len(), "the program has only {flags:?}");
        for [from, to] in [[a, b], [b, a]] {
            let report = from.migrate(ID)?;
            ensure!(report["memory"]["fallback"] == "", "{report:#}");
            children(to, 3)?;
            let after = mappings(to)?;
            for ((start, end), flags) in &before {
                // Mappings that are alike may have become one.
                let whole = after.range(..=(*start, u64::MAX)).next_back();
                let whole = whole.filter(|((_, last), now)| end <= last && *now == flags);
                ensure!(whole.is_some(), "{start:x}-{end:x} was {flags:?}, now: {after:?}");
            }
        }
        world.remove(a, ID)
    })
}
