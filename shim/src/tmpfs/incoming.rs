//! The target's end: mounts that wait for CRIU.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tracing::warn;
use transship_criu::{Amendments, images::MemoryDir};
use transship_migration::MigrationError;

use super::{filler::Filler, key_of};
use crate::{cgroup::Cgroup, mounts};

/// In the bundle, where cleaning up after a shim that died finds it.
pub const DIRECTORY: &str = "tmpfs";

/// The tmpfs mounts of a container that arrives.
pub struct Incoming {
    directory: PathBuf,
    filler: Option<Filler>,
}

impl Incoming {
    pub fn new(bundle: &Path) -> Self {
        Self { directory: bundle.join(DIRECTORY), filler: None }
    }

    /// Before the pause: starts who will make them, where CRIU is, so that
    /// what they hold is charged to the container.
    pub fn prepare(&mut self, criu_pid: i32) -> Result<(), MigrationError> {
        let failed =
            |error: crate::error::Error| MigrationError::runtime("restore", error.sentence());
        let filler = Filler::start().map_err(failed)?;
        let joined =
            Cgroup::of_process(criu_pid).and_then(|cgroup| cgroup.take_memory_of(filler.pid()));
        if let Err(error) = joined {
            let error = error.sentence();
            warn!(error, "the files of tmpfs mounts are not charged to the container");
        }
        self.filler = Some(filler);
        Ok(())
    }

    /// Nothing is to be made: whoever waits for it leaves the container's
    /// groups, which the OCI runtime can remove only then.
    pub async fn dismiss(&mut self) {
        if let Some(filler) = self.filler.take() {
            filler.dismiss().await;
        }
    }

    /// Every image is here: makes those mounts that came beside them. The
    /// result is told to CRIU with [`amend`].
    pub async fn make(&mut self, images: &MemoryDir) -> Result<Made, MigrationError> {
        let path = images.path();
        if !fs::exists(path.join(super::LIST)).unwrap_or(false) {
            self.dismiss().await;
            return Ok(Made::default());
        }
        let missing = || MigrationError::runtime("restore", "nobody can make its tmpfs mounts");
        let filler = self.filler.take().ok_or_else(missing)?;
        let count = filler.fill(&path, &self.directory).await?;
        let made = (0..count).map(|number| (key_of(number), place(&self.directory, number)));
        Ok(Made(made.collect()))
    }

    /// CRIU has bound them, or nobody will.
    pub async fn remove(&self) {
        if !self.directory.exists() {
            return;
        }
        if let Err(error) = mounts::unmount(&self.directory).await {
            warn!(error = error.sentence(), "mounts of an arrival are still there");
        }
        if let Err(error) = fs::remove_dir(&self.directory) {
            warn!(%error, directory = %self.directory.display(), "not removed");
        }
    }
}

/// Mounts that CRIU binds, by the names that its images know.
#[derive(Default)]
pub struct Made(Vec<(String, PathBuf)>);

impl Made {
    pub fn amend(&self, request: &mut Amendments<'_>) {
        for (key, place) in &self.0 {
            request.external_mount(key, &place.to_string_lossy());
        }
    }
}

/// Where mount `number` of the list waits.
pub fn place(directory: &Path, number: usize) -> PathBuf {
    directory.join(number.to_string())
}
