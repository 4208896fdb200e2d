//! `transship plan`: it says plausible things of a container that runs, and
//! leaves it and both nodes as they were.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use transship_integration::{
    agents::{Pair, Refused, Site},
    daemon::{self, Runtime},
    images::Image,
    until,
    workload::Workload,
};

const ID: &str = "planned";
const MIB: u64 = 256;

fn with_agents(test: impl FnOnce(&Site, &Site) -> Result<()>) -> Result<()> {
    let Pair { a, b } = Pair::start()?;
    let done = test(&a, &b);
    if done.is_err() {
        for site in [&a, &b] {
            eprintln!("--- transshipd on {}:\n{}", site.name(), site.agent_log());
            daemon::show_log(site);
        }
    }
    done
}

/// A workload that has filled its memory.
fn start(site: &Site, arguments: &[&str]) -> Result<Workload> {
    let reference = site.image(Image::Workload)?;
    let mut command = vec!["run", "-d", "--runtime", Runtime::Transship.name()];
    command.extend([reference, ID, "workload"]);
    command.extend(arguments);
    site.ctr_ok(&command)?;
    Workload::of(site, ID)
}

fn plan(site: &Site, flags: &[&str]) -> Result<std::result::Result<Value, Refused>> {
    let mut command = vec!["plan", ID, "--to", "b"];
    command.extend(flags);
    site.transship(&command)
}

fn planned(site: &Site, flags: &[&str]) -> Result<Value> {
    plan(site, flags)?.map_err(|refused| anyhow::anyhow!("{refused:#?}"))
}

fn number(of: &Value, path: &str) -> Result<u64> {
    of.pointer(path).and_then(Value::as_u64).with_context(|| format!("{path} in {of:#}"))
}

/// No process of the container has memory that somebody watches, and none is
/// stopped or traced.
fn untouched(site: &Site) -> Result<()> {
    let script = format!(
        "for pid in $(ctr task ps {ID} | awk 'NR > 1 {{ print $1 }}'); do \
           grep -e VmFlags /proc/$pid/smaps; grep -e State: -e TracerPid: /proc/$pid/task/*/status; \
         done"
    );
    let text = site.sh(&script)?;
    ensure!(text.contains("VmFlags"), "no process: {text}");
    for line in text.lines() {
        if let Some((_, flags)) = line.split_once("VmFlags:") {
            // Missing, write-protected, minor: proc_pid_smaps(5).
            let watched = flags.split_whitespace().any(|flag| ["um", "uw", "ui"].contains(&flag));
            ensure!(!watched, "still watched: {line}");
        } else if line.contains("State:") {
            ensure!(!line.contains("stop"), "stopped: {line}");
        } else {
            ensure!(line.ends_with("\t0"), "traced: {line}");
        }
    }
    Ok(())
}

#[test]
fn a_plan_is_plausible_and_leaves_everything_as_it_was() -> Result<()> {
    with_agents(|a, b| {
        let work = start(a, &["--mib", "256", "--processes", "2", "--rate", "20"])?;
        work.verify()?;
        let (here, there) = (a.inventory()?, b.inventory()?);
        let descriptors = open_files(a)?;

        let plan = planned(a, &["--watch", "2s"])?;
        ensure!(plan["movable"] == true && plan["refusals"] == serde_json::json!([]), "{plan:#}");
        let pages = number(&plan, "/memory/pages")?;
        let filled = MIB << 8;
        ensure!((filled..filled * 3 / 2).contains(&pages), "{plan:#}");
        ensure!(number(&plan, "/memory/processes")? >= 2, "{plan:#}");
        ensure!(number(&plan, "/memory/zero_pages")? < pages / 4, "{plan:#}");
        ensure!(number(&plan, "/link/rate")? > 1 << 20, "{plan:#}");
        ensure!(number(&plan, "/content_bytes")? > 0, "b has the image: {plan:#}");
        let pause = number(&plan, "/prediction/expected_downtime_us")?;
        ensure!((1_000..5_000_000).contains(&pause), "{plan:#}");
        let total = number(&plan, "/prediction/expected_total_us")?;
        ensure!(total > pause && total < 600_000_000, "{plan:#}");

        if plan["memory"]["backend"] == "none" {
            eprintln!("this kernel notices no writes: rounds cannot be planned");
        } else {
            // 20 MiB/s, as far as the machine has time for it, and not more
            // than all.
            let written = number(&plan, "/memory/written_pages")?;
            ensure!((50..pages).contains(&written), "{plan:#}");
            ensure!(number(&plan, "/memory/hot_pages")? <= written, "{plan:#}");
            let intervals = plan["memory"]["written"].as_array().map_or(0, Vec::len);
            ensure!(intervals == 20, "{plan:#}");
            let first = number(&plan, "/prediction/rounds/0/dirty_pages")?;
            ensure!(first == pages, "{plan:#}");
        }

        ensure!(a.status(ID)? == "RUNNING");
        untouched(a)?;
        work.verify()?;
        until("the shim to keep nothing open", || {
            Ok((open_files(a)? == descriptors).then_some(()))
        })?;
        a.nothing_more(&here)?;
        b.nothing_more(&there)?;
        ensure!(a.migrations()?.is_empty() && b.migrations()?.is_empty());

        // What it says of the link is what it is told.
        let slow = planned(a, &["--watch", "200ms", "--bandwidth", "8Mbit/s"])?;
        ensure!(number(&slow, "/prediction/expected_total_us")? > 100_000_000, "{slow:#}");

        // And a migration right after it finds nothing in its way.
        let report = a.migrate(ID)?;
        ensure!(report["target_state"] == "RUNNING", "{report:#}");
        Workload::of(b, ID)?.verify()?;
        Ok(())
    })
}

/// With almost no bandwidth it would take minutes.
#[test]
fn the_bandwidth_of_a_migration_changes_while_it_runs() -> Result<()> {
    with_agents(|a, b| {
        start(a, &["--mib", "64"])?.verify()?;
        let begun = a.begin(&["migrate", ID, "--to", "b", "--bandwidth", "400KiB/s"])?;
        let migration = a.await_phase(ID, "rounds")?;
        let status = a.answer(&["status", &migration])?;
        ensure!(status["progress"]["phase"] == "rounds", "{status:#}");
        ensure!(status["report"].is_null(), "{status:#}");

        // At the target there is nothing to change.
        let limit = ["limit", &migration, "--bandwidth", "none"];
        match b.transship(&limit)? {
            Ok(answer) => anyhow::bail!("the target takes it: {answer:#}"),
            Err(refused) => ensure!(refused.reason.contains("is sent by a"), "{refused:#?}"),
        }
        let answer = a.answer(&limit)?;
        ensure!(answer["bandwidth"].is_null(), "{answer:#}");
        let report = begun.end()?.map_err(|refused| anyhow::anyhow!("{refused:#?}"))?;
        ensure!(report["memory"]["rounds"].as_array().is_some_and(|r| !r.is_empty()), "{report:#}");
        Workload::of(b, ID)?.verify()?;

        // The same report again; and nothing that could be changed any more.
        let status = a.answer(&["status", &migration])?;
        ensure!(status["report"] == report, "{status:#}");
        match a.transship(&limit)? {
            Ok(answer) => anyhow::bail!("it has ended: {answer:#}"),
            Err(refused) => ensure!(refused.reason.contains("has ended"), "{refused:#?}"),
        }
        Ok(())
    })
}

#[test]
fn what_cannot_be_planned_and_what_would_be_refused() -> Result<()> {
    with_agents(|a, b| {
        let code = |flags: &[&str]| -> Result<String> {
            match a.transship(flags)? {
                Ok(plan) => anyhow::bail!("it is planned: {plan:#}"),
                Err(refused) => Ok(refused.code),
            }
        };
        ensure!(code(&["plan", "nobody", "--to", "b"])? == "unknown-container");
        start(a, &["--mib", "8"])?;
        ensure!(code(&["plan", ID, "--to", "nowhere"])? == "unknown-node");

        // A target that is not there, and one that would refuse.
        let plan = planned(a, &["--watch", "100ms"])?;
        ensure!(plan["movable"] == true, "{plan:#}");
        let image = b.image(Image::Workload)?;
        b.ctr_ok(&["container", "create", image, ID])?;
        let plan = planned(a, &["--watch", "100ms"])?;
        ensure!(plan["refusals"][0]["code"] == "name-taken", "{plan:#}");
        ensure!(plan["movable"] == false && plan["content_bytes"] == 0, "{plan:#}");

        // Flags that cannot be are refused where they are read.
        for (flag, words) in [
            ("--max-pause=100", "write it like 100ms"),
            ("--lanes=0", "from 1 to 16"),
            ("--bandwidth=fast", "1Gbit/s"),
            ("--throttle=maybe", "auto, never"),
        ] {
            // Both have them.
            for verb in ["plan", "migrate"] {
                let said = a.sh(&format!("transship {verb} {ID} --to b {flag} 2>&1; echo =$?"))?;
                ensure!(said.contains(words) && said.trim().ends_with("=2"), "{flag}: {said}");
            }
        }
        untouched(a)
    })
}

/// How many descriptors the shim of the container has.
fn open_files(site: &Site) -> Result<usize> {
    let script = "for at in /proc/[0-9]*; do \
                    case $(tr '\\0' ' ' < $at/cmdline 2> /dev/null) in \
                      *containerd-shim-transship-v2*planned*) ls $at/fd ;; \
                    esac; \
                  done";
    let count = site.sh(script)?.lines().count();
    ensure!(count > 0, "no shim of {ID} was found");
    Ok(count)
}
