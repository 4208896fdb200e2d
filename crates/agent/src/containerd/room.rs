//! How much room an arrival would find.

use std::{fs, path::Path};

use containerd_client::services::v1::{Plugin, PluginsRequest};
use nix::sys::statvfs::statvfs;

use super::{Containerd, ContainerdError, LOOK_UP, Object, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Free on the file system of the snapshots and that of the content: the
    /// smaller, when they differ.
    pub disk_bytes: u64,
    /// What the kernel thinks it could give without swapping.
    pub memory_bytes: u64,
}

impl Containerd {
    pub async fn room(&self) -> Result<Room> {
        let mut disk_bytes = u64::MAX;
        let roots = self.roots().await?;
        for root in &roots {
            disk_bytes = disk_bytes.min(free_bytes(Path::new(root))?);
        }
        if roots.is_empty() {
            // Then the arrival itself will tell.
            tracing::warn!("containerd does not say where its files lie");
        }
        Ok(Room { disk_bytes, memory_bytes: memory_available()? })
    }

    /// The snapshotters that work here.
    pub async fn snapshotters(&self) -> Result<Vec<String>> {
        let plugins = self.plugins("type==io.containerd.snapshotter.v1").await?;
        Ok(plugins.into_iter().filter(|p| p.init_err.is_none()).map(|p| p.id).collect())
    }

    /// Content in one namespace can be used in another without a copy, unless
    /// somebody configured it otherwise.
    pub(super) async fn shares_content(&self) -> Result<bool> {
        let plugins = self.plugins("type==io.containerd.metadata.v1").await?;
        let policy = |p: &Plugin| p.exports.get("policy").is_some_and(|policy| policy == "shared");
        Ok(plugins.iter().any(policy))
    }

    /// Where blobs and the snapshots of the usual snapshotter lie.
    async fn roots(&self) -> Result<Vec<String>> {
        let mut roots = Vec::new();
        for filter in
            ["type==io.containerd.content.v1", "type==io.containerd.snapshotter.v1,id==overlayfs"]
        {
            let plugins = self.plugins(filter).await?;
            roots.extend(plugins.into_iter().filter_map(|mut p| p.exports.remove("root")));
        }
        Ok(roots)
    }

    async fn plugins(&self, filter: &str) -> Result<Vec<Plugin>> {
        let request = PluginsRequest { filters: vec![filter.to_owned()] };
        let answer = self
            .ask(
                Object::Containerd.doing("ask the plugins of"),
                LOOK_UP,
                self.introspection().plugins(request),
            )
            .await?;
        Ok(answer.plugins)
    }
}

fn free_bytes(directory: &Path) -> Result<u64> {
    let stat = statvfs(directory)
        .map_err(|e| ContainerdError::file("look at the file system of", directory, e.into()))?;
    // What root may still take, as containerd runs as root.
    Ok(stat.blocks_free().saturating_mul(stat.fragment_size()))
}

fn memory_available() -> Result<u64> {
    let path = Path::new("/proc/meminfo");
    let text = fs::read_to_string(path).map_err(|e| ContainerdError::file("read", path, e))?;
    parse_memory_available(&text).ok_or_else(|| {
        let missing = std::io::Error::other("it has no MemAvailable");
        ContainerdError::file("understand", path, missing)
    })
}

fn parse_memory_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_bytes() {
        let text = "MemTotal:       16000000 kB\nMemAvailable:    1234 kB\nBuffers: 1 kB\n";
        assert_eq!(parse_memory_available(text), Some(1234 * 1024));
        for bad in ["", "MemAvailable:", "MemAvailable: many kB", "MemAvailable: 1 MB"] {
            assert_eq!(parse_memory_available(bad), None, "{bad:?}");
        }
        assert!(memory_available().unwrap() > 0);
    }
}
