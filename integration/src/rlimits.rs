//! For test machines whose root lacks CAP_SYS_RESOURCE: without it CRIU cannot
//! read the limits of a process of another user, and dumps of any image that
//! does not run as root fail. There, and only there, CRIU is started with a
//! small library that reads them from `/proc/PID/limits` instead.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

use anyhow::{Context, Result, bail};

use crate::locate;

const SOURCE: &str = include_str!("../preload/rlimits.c");
/// CAP_SYS_RESOURCE (capability.h).
const SYS_RESOURCE: u32 = 24;

/// The program to use as CRIU on this machine; nothing where CRIU itself does.
pub(crate) fn criu_wrapper() -> Result<Option<PathBuf>> {
    if has_sys_resource()? {
        return Ok(None);
    }
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        eprintln!("harness: this machine's root lacks CAP_SYS_RESOURCE; CRIU gets a preload that reads /proc/PID/limits");
    });
    let dir = locate::target_dir()?.join("harness");
    fs::create_dir_all(&dir)?;
    let (library, wrapper) = (dir.join("rlimits.so"), dir.join("criu"));
    let source = dir.join("rlimits.c");
    if fs::read_to_string(&source).ok().as_deref() != Some(SOURCE) || !library.exists() {
        // Written last under its own name: whoever finds it finds it whole.
        let unique = tempfile::Builder::new().prefix("rlimits").tempdir_in(&dir)?;
        let (text, built) = (unique.path().join("rlimits.c"), unique.path().join("rlimits.so"));
        fs::write(&text, SOURCE)?;
        let status = Command::new("gcc")
            .args(["-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o"])
            .args([&built, &text])
            .status()
            .context("run gcc")?;
        if !status.success() {
            bail!("gcc could not compile {}", text.display());
        }
        fs::rename(built, &library)?;
        fs::rename(text, &source)?;
    }
    // By its full name: the wrapper is called criu as well.
    let criu = ["/usr/local/sbin/criu", "/usr/sbin/criu", "/usr/bin/criu"]
        .into_iter()
        .find(|path| Path::new(path).exists());
    let criu = criu.context("criu is not installed (hack/install-deps.sh installs it)")?;
    let script = format!(
        "#!/bin/sh\nLD_PRELOAD={}${{LD_PRELOAD:+:$LD_PRELOAD}} exec {criu} \"$@\"\n",
        library.display()
    );
    if fs::read_to_string(&wrapper).ok().as_deref() != Some(&script) {
        let mut file = tempfile::NamedTempFile::new_in(&dir)?;
        std::io::Write::write_all(&mut file, script.as_bytes())?;
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o755))?;
        // Kept open for writing it could not be executed.
        file.into_temp_path().persist(&wrapper)?;
    }
    Ok(Some(wrapper))
}

fn has_sys_resource() -> Result<bool> {
    let status = fs::read_to_string("/proc/self/status")?;
    let effective =
        status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("CapEff")?;
    Ok(u64::from_str_radix(effective.trim(), 16)? & (1 << SYS_RESOURCE) != 0)
}
