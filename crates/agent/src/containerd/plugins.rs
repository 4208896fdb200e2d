//! What this containerd is made of: its plugins, and the disk they use.

use std::path::Path;

use containerd_client::services::v1::{Plugin, PluginsRequest};
use nix::sys::statvfs::statvfs;

use super::{Containerd, ContainerdError, LOOK_UP, Object, Result};

impl Containerd {
    /// Free on the file system of the snapshots and that of the content: the
    /// smaller, when they differ.
    pub(super) async fn free_disk_bytes(&self) -> Result<u64> {
        let roots = self.roots().await?;
        if roots.is_empty() {
            // Then the arrival itself will tell.
            tracing::warn!("containerd does not say where its files lie");
        }
        roots.iter().try_fold(u64::MAX, |least, root| Ok(least.min(free_bytes(Path::new(root))?)))
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

/// A containerd that has never held anything has no folders for it yet: then
/// what is above them counts.
fn free_bytes(directory: &Path) -> Result<u64> {
    let there = directory.ancestors().find(|one| one.exists()).unwrap_or(directory);
    let stat = statvfs(there)
        .map_err(|e| ContainerdError::file("look at the file system of", directory, e.into()))?;
    // What root may still take, as containerd runs as root.
    Ok(stat.blocks_free().saturating_mul(stat.fragment_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_there_yet_has_the_room_of_those_above() {
        let dir = tempfile::tempdir().unwrap();
        let absent = dir.path().join("io.containerd.content.v1.content/blobs");
        assert!(free_bytes(&absent).unwrap() > 0);
    }
}
