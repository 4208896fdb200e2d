//! Memory that processes share: it travels as their own does, and CRIU saves
//! none of it.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use transship_integration::{agents::Site, bin_dir, images::Image, until};

use crate::world::{World, with_agents};

const ID: &str = "shared";
const PROGRAM: &str = include_str!("shared.py");
const PROCESSES: usize = 3;
/// Beside the anonymous object: two memfds, and a SysV segment, which CRIU has
/// to fill itself.
const MEMFDS_MIB: u64 = 12 + 1;
const SEGMENT_MIB: u64 = 8;

/// What CRIU's images have apart from these objects: files for each process,
/// and the segment that nobody has attached.
const IMAGES: u64 = 6 << 20;

fn start(world: &World, mib: u64, rate: u64) -> Result<()> {
    let (mib, rate) = (mib.to_string(), rate.to_string());
    let program = ["python3", "-c", PROGRAM, &mib, &rate];
    world.start_of(&world.a, Image::Python, ID, &[], &program)?;
    all_have_written(&world.a, "ready").map(drop)
}

/// The files `NAME-PROCESS` of the container.
fn all_have_written(site: &Site, name: &str) -> Result<Vec<String>> {
    let root = format!("/proc/{}/root", site.task_pid(ID)?);
    until(&format!("{name} of every process"), || {
        let files = (0..PROCESSES).map(|process| {
            let path = site.path(format!("{root}/{name}-{process}"));
            Ok(path.exists().then(|| std::fs::read_to_string(&path)).transpose()?)
        });
        files.collect::<Result<Option<Vec<String>>>>()
    })
}

/// Every process finds everything as it should be. `number`: from 1 on.
fn verify(site: &Site, number: u32) -> Result<()> {
    let question = format!("/proc/{}/root/verify-{number}", site.task_pid(ID)?);
    std::fs::write(site.path(question), "")?;
    let wrong = all_have_written(site, &format!("answer-{number}"))?;
    ensure!(wrong.iter().all(|count| count == "0"), "wrong pages by process: {wrong:?}");
    Ok(())
}

fn number(of: &Value, name: &str) -> Result<u64> {
    of[name].as_u64().with_context(|| format!("{name} in {of:#}"))
}

fn went_beside_criu(report: &Value, mib: u64) -> Result<()> {
    let memory = &report["memory"];
    ensure!(memory["fallback"] == "", "{report:#}");
    let given = number(memory, "given_bytes")?;
    ensure!(given >= (mib + MEMFDS_MIB) << 20, "{report:#}");
    ensure!(number(memory, "shared_bytes")? >= given + (SEGMENT_MIB << 20), "{report:#}");
    ensure!(number(report, "image_bytes")? < IMAGES, "{report:#}");
    Ok(())
}

#[test]
fn what_processes_share_arrives_beside_the_images_and_is_shared() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world, 64, 500)?;
        verify(a, 1)?;
        went_beside_criu(&a.migrate_whatever_it_takes(ID)?, 64)?;
        verify(b, 2)?;
        // As CRIU restored them they are objects like any other.
        went_beside_criu(&b.migrate_whatever_it_takes(ID)?, 64)?;
        verify(a, 3)?;
        world.remove(a, ID)
    })
}

/// Not a test but a measurement: with the library beside the shim, or without.
#[test]
#[ignore = "a measurement, which proves nothing on a busy machine"]
fn pause() -> Result<()> {
    let library = bin_dir()?.join("libtransship_hollow.so").exists();
    for mib in [128, 512] {
        with_agents(|world| {
            start(world, mib, 50)?;
            let mut sites = [&world.a, &world.b];
            for round in 1..=4 {
                let [from, to] = sites;
                let report = from.migrate_whatever_it_takes(ID)?;
                let pause = &report["memory"]["pause"];
                let images = number(&report, "image_bytes")? >> 10;
                println!(
                    "{mib} MiB, library {library}: {} us, images {images} KiB, {pause}",
                    report["downtime_us"]
                );
                verify(to, round)?;
                sites.reverse();
            }
            world.remove(sites[0], ID)
        })?;
    }
    Ok(())
}
