//! Where the programs under test lie.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// The folder of the programs under test: `TRANSSHIP_BIN_DIR`, or the profile
/// folder this very program was built into.
pub fn bin_dir() -> Result<PathBuf> {
    match env::var_os("TRANSSHIP_BIN_DIR") {
        Some(dir) => {
            Path::new(&dir).canonicalize().with_context(|| format!("TRANSSHIP_BIN_DIR {dir:?}"))
        }
        None => own_dir(),
    }
}

/// Cargo's target folder, where what takes long to make is kept.
pub fn target_dir() -> Result<PathBuf> {
    let own = own_dir()?;
    Ok(own.parent().unwrap_or(&own).to_owned())
}

/// The node helper, always of the same build as the harness that talks to it.
pub(crate) fn helper() -> Result<PathBuf> {
    let path = own_dir()?.join("transship-node");
    path.canonicalize().with_context(|| format!("{} (is it built?)", path.display()))
}

/// Test programs lie in `deps/` below the profile folder, others in it.
fn own_dir() -> Result<PathBuf> {
    let program = env::current_exe().context("path of this program")?;
    let dir = program.parent().context("this program has no folder")?;
    if dir.ends_with("deps") {
        Ok(dir.parent().unwrap_or(dir).to_owned())
    } else {
        Ok(dir.to_owned())
    }
}
