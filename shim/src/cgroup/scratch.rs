//! A group of this host with one process in it, for tests.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio, id},
};

use super::Cgroup;

pub struct Scratch {
    pub cgroup: Cgroup,
    pub child: Child,
    directories: Vec<PathBuf>,
}

impl Scratch {
    /// With these controllers, as far as the host has a directory for each;
    /// `script` is run by a shell. None, said aloud, where no group can be
    /// made.
    pub fn create(name: &str, controllers: &[&str], script: &str) -> Option<Self> {
        let made = Self::make(name, controllers, script);
        if made.is_none() {
            eprintln!("NOT TESTED: no group with {controllers:?} can be made here");
        }
        made
    }

    fn make(name: &str, controllers: &[&str], script: &str) -> Option<Self> {
        let own = Cgroup::of_process(id() as i32).ok()?;
        let name = format!("transship-{name}-{}", id());
        let child = Command::new("sh")
            .args(["-c", script])
            // Whoever waits for the end of our output must not wait for it.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut scratch = Self { cgroup: own.clone(), child, directories: Vec::new() };
        let mut join = |above: PathBuf| {
            let directory = above.join(&name);
            fs::create_dir(&directory).ok()?;
            scratch.directories.push(directory.clone());
            fs::write(directory.join("cgroup.procs"), scratch.child.id().to_string()).ok()?;
            Some(directory)
        };
        scratch.cgroup = match own {
            Cgroup::V2(directory) => Cgroup::V2(join(directory)?),
            Cgroup::V1(all) => {
                let join = |name: &&str| Some(((*name).to_owned(), join(all.get(*name)?.clone())?));
                Cgroup::V1(controllers.iter().map(join).collect::<Option<_>>()?)
            }
        };
        Some(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for directory in &self.directories {
            let _ = fs::remove_dir(directory);
        }
    }
}
