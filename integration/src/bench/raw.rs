//! B3: memory to memory over plain TCP, as many streams as we have lanes. No
//! program can do better on these nodes with what the kernel offers.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::{Node, bin_dir, eventually};

const PORT: u16 = 7600;

/// What `bench-node take` prints.
#[derive(Deserialize)]
struct Taken {
    bytes: u64,
    took_ns: u64,
}

/// Bytes in a second.
pub fn copy(a: &Node, b: &Node, mib: usize, streams: usize) -> Result<f64> {
    let helper = bin_dir()?.join("bench-node");
    let helper = helper.to_string_lossy();
    let (mib_text, streams_text) = (mib.to_string(), streams.to_string());
    let listen = format!("{}:{PORT}", b.address()?);
    let log = b.dir().join("take.log");
    let _ = std::fs::remove_file(&log);
    let mut take = b.spawn("take", &[&helper, "take", &listen, &mib_text, &streams_text])?;
    eventually("the receiver to listen", || {
        ensure!(take.is_running()?, "bench-node ended: {}", take.output());
        Ok(take.output().contains("listening"))
    })?;
    a.ok(&[&helper, "give", &listen, &mib_text, &streams_text])?;
    let code = take.wait()?;
    let said = take.output();
    ensure!(code == 0, "bench-node ended with {code}: {said}");
    let line =
        said.lines().find(|line| line.starts_with('{')).context("an answer of bench-node")?;
    let taken: Taken = serde_json::from_str(line)?;
    ensure!(taken.bytes == (mib as u64) << 20, "{} bytes of {mib} MiB came", taken.bytes);
    Ok(taken.bytes as f64 / (taken.took_ns as f64 / 1e9))
}
