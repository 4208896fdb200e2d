//! Which CRIU is installed, and what it can do.

use std::{
    env, fmt, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{process::Command, sync::OnceCell, time::timeout};

use crate::{CriuError, stub};

/// Oldest CRIU we lean on. 4.1 cannot dump an inet socket on Linux 6.16 and
/// later (SO_PASSCRED), and its images differ.
pub const OLDEST: Version = Version { major: 4, minor: 2, patch: 0 };

/// `criu --version` takes milliseconds; a hung one must not hang us.
const VERSION_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl Version {
    /// As one number, the way CRIU's own library writes it: 4.2.1 is 40201.
    pub fn number(self) -> u32 {
        self.major * 10_000 + self.minor * 100 + self.patch
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split(['.', '-']).map(|part| part.parse().ok());
        let major = parts.next()??;
        let minor = parts.next()??;
        let patch = parts.next().flatten().unwrap_or(0);
        Some(Self { major, minor, patch })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// The CRIU that the gate would use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    pub path: PathBuf,
    pub version: Version,
}

impl Installed {
    pub fn is_recent_enough(&self) -> bool {
        self.version >= OLDEST
    }
}

/// The real CRIU: what `TRANSSHIP_CRIU` names, else the first in PATH that is
/// not this program itself.
pub fn find_criu() -> Option<PathBuf> {
    if let Some(named) = env::var_os(stub::CRIU).map(PathBuf::from) {
        return is_program(&named).then_some(named);
    }
    let own = fs::canonicalize("/proc/self/exe").ok();
    // Daemons are often started with a PATH without the sbin directories.
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(usual)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join("criu"))
        .find(|path| is_program(path) && fs::canonicalize(path).ok() != own)
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Asks the installed CRIU for its version.
pub async fn probe() -> Result<Installed, CriuError> {
    let path = find_criu().ok_or(CriuError::NoCriu)?;
    let run = Command::new(&path).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = timeout(VERSION_DEADLINE, run)
        .await
        .map_err(|_| CriuError::Probe(format!("{} --version hangs", path.display())))?
        .map_err(CriuError::file("running", &path))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("Version:"))
        .and_then(Version::parse)
        .filter(|_| output.status.success())
        .ok_or_else(|| {
            let said = String::from_utf8_lossy(&output.stderr);
            let said: String = said.trim().chars().take(300).collect();
            CriuError::Probe(format!("{} does not tell its version: {said}", path.display()))
        })?;
    Ok(Installed { path, version })
}

/// Whether CRIU can keep packets away with nftables, by its own library. The
/// default starts `iptables-restore` several times within the pause. Asked
/// once per process: it depends on CRIU's build and on the kernel.
pub async fn locks_network_with_nftables() -> bool {
    static ANSWER: OnceCell<bool> = OnceCell::const_new();
    let ask = async {
        let Some(path) = find_criu() else { return false };
        let check = Command::new(path)
            .args(["check", "--feature", "network_lock_nftables"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .status();
        matches!(timeout(VERSION_DEADLINE, check).await, Ok(Ok(status)) if status.success())
    };
    *ANSWER.get_or_init(|| ask).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        for (text, number) in
            [("4.2.1", 40201), (" 4.2", 40200), ("3.17.1", 31701), ("4.3-rc1", 40300)]
        {
            assert_eq!(Version::parse(text).unwrap().number(), number, "{text}");
        }
        assert_eq!(Version::parse("unknown"), None);
        assert!(Version::parse("4.1.1").unwrap() < OLDEST);
    }
}
