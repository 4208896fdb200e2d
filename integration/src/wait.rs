//! Waiting for a state. Tests never sleep for a guessed time: they name what
//! they wait for, and a test that waits in vain says what never came.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Longer than anything here takes on two busy cores, short enough that a
/// hanging test is noticed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Between two looks: short against a container's start (some 100 ms).
const INTERVAL: Duration = Duration::from_millis(10);

/// Waits until `look` finds something.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("waited {} s in vain for {what}", PATIENCE.as_secs());
        }
        sleep(INTERVAL);
    }
}

/// Waits until `holds` is true.
pub fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, || Ok(holds()?.then_some(())))
}
