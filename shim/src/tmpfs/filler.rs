//! Makes and fills mounts in a process of its own.
//!
//! The kernel charges a page of a tmpfs to the control group of the process
//! that writes it first. The shim is in none of the container's; so a child of
//! it, which is the shim's own program under another name, is put there before
//! the pause and waits. It does its one job within the pause and ends, before
//! CRIU starts on its own.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::{fs::DirBuilderExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{self, Stdio},
};

use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
};
use tracing::warn;
use transship_migration::{MigrationError, chain};
use transship_rootfs::tmpfs::{Options, make};

use super::{Entry, LIST, contents_of, incoming::place};
use crate::error::{Error, Result};

const NAME: &str = "transship-filler";

/// What the source sends at most; some 40 bytes for each mount.
const LIST_LIMIT: u64 = 64 << 10;
/// Sources plan no more.
const MOUNTS: usize = 64;
/// Of an answer that is an error.
const ANSWER_LIMIT: u64 = 16 << 10;

#[derive(Serialize, Deserialize)]
struct Job {
    images: PathBuf,
    directory: PathBuf,
}

/// When this process was started under the filler's name it is one, and this
/// call does not return.
pub fn fill_if_asked() {
    let name = env::args_os().next().unwrap_or_default();
    if Path::new(&name).file_name() != Some(OsStr::new(NAME)) {
        return;
    }
    let mut job = Vec::new();
    // Nothing at all: it is not needed.
    if io::stdin().read_to_end(&mut job).is_err() || job.is_empty() {
        process::exit(0);
    }
    let done = serde_json::from_slice(&job)
        .map_err(|error| error.to_string())
        .and_then(|job: Job| fill(&job.images, &job.directory));
    let (answer, status) = match done {
        Ok(count) => (count.to_string(), 0),
        Err(why) => (why, 1),
    };
    let told = io::stdout().write_all(answer.as_bytes());
    process::exit(if told.is_ok() { status } else { 1 });
}

/// Makes everything of the list; answers how many that is.
fn fill(images: &Path, directory: &Path) -> std::result::Result<usize, String> {
    let list = read_list(&images.join(LIST))?;
    hide(directory).map_err(|error| format!("prepare {}: {error}", directory.display()))?;
    for (number, entry) in list.iter().enumerate() {
        let options: Options = entry.options.parse().map_err(|error| chain(&error))?;
        let contents = images.join(contents_of(number));
        let at = place(directory, number);
        let told = |error: io::Error| format!("{}: {error}", contents.display());
        fs::create_dir(&at).map_err(|error| format!("{}: {error}", at.display()))?;
        let mut file = File::open(&contents).map_err(told)?;
        make(&entry.source, &options, &at, &mut file).map_err(|error| chain(&error))?;
        // It is there twice as long as this lasts.
        fs::remove_file(&contents).map_err(told)?;
    }
    Ok(list.len())
}

fn read_list(path: &Path) -> std::result::Result<Vec<Entry>, String> {
    let told = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let mut json = Vec::new();
    let file = File::open(path).map_err(|error| told(&error))?;
    file.take(LIST_LIMIT).read_to_end(&mut json).map_err(|error| told(&error))?;
    let list: Vec<Entry> = serde_json::from_slice(&json).map_err(|error| told(&error))?;
    if list.len() > MOUNTS {
        return Err(told(&format!("{} mounts, at most {MOUNTS} are allowed", list.len())));
    }
    if list.iter().any(|entry| entry.source.contains('\0')) {
        return Err(told(&"a source that is no name"));
    }
    Ok(list)
}

/// A place that nobody else can look into, and whose mounts no other mount
/// namespace gets.
fn hide(directory: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("transship"), directory, Some("tmpfs"), flags, Some("mode=0700"))?;
    mount(None::<&str>, directory, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    Ok(())
}

/// A filler that waits. Dropped, it is killed.
pub struct Filler {
    child: Child,
    pid: i32,
}

impl Filler {
    pub fn start() -> Result<Self> {
        // Not our path but our program, also when an upgrade has replaced it.
        let mut command = process::Command::new("/proc/self/exe");
        command.arg0(NAME).env_clear().current_dir("/");
        // What is sent to the shim's process group is not meant for it.
        command.process_group(0);
        let mut command = Command::from(command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.kill_on_drop(true);
        let child = command.spawn().map_err(Error::io("start who makes tmpfs mounts"))?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| Error::Internal("a child without a pid".into()))?;
        Ok(Self { child, pid })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Returns once it has ended, without having done anything.
    pub async fn dismiss(mut self) {
        drop(self.child.stdin.take());
        if let Err(error) = self.child.wait().await {
            warn!(%error, "the end of a child was not seen");
        }
    }

    /// Makes the mounts whose list is among `images` in `directory`; answers
    /// how many. On an error those that were made before it are still there.
    pub async fn fill(
        mut self,
        images: &Path,
        directory: &Path,
    ) -> std::result::Result<usize, MigrationError> {
        let failed = |why: String| {
            MigrationError::runtime("restore", format!("make its tmpfs mounts: {why}"))
        };
        let job = Job { images: images.into(), directory: directory.into() };
        let job = serde_json::to_vec(&job).map_err(|error| failed(error.to_string()))?;
        let (Some(mut input), Some(output)) = (self.child.stdin.take(), self.child.stdout.take())
        else {
            return Err(failed("it cannot be spoken to".into()));
        };
        let asked = async {
            input.write_all(&job).await?;
            drop(input);
            let mut answer = String::new();
            output.take(ANSWER_LIMIT).read_to_string(&mut answer).await?;
            Ok::<_, io::Error>((answer, self.child.wait().await?))
        };
        match asked.await.map_err(|error| failed(error.to_string()))? {
            (answer, status) if status.success() => {
                answer.parse().map_err(|_| failed("an answer that is none".into()))
            }
            (why, _) if !why.is_empty() => Err(failed(why)),
            // Killed, most likely for want of memory.
            (_, status) => Err(failed(format!("it ended: {status}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> std::result::Result<Vec<Entry>, String> {
        let images = tempfile::tempdir().unwrap();
        let path = images.path().join(LIST);
        fs::write(&path, json).unwrap();
        read_list(&path)
    }

    #[test]
    fn a_list_is_checked_before_anything_is_made() {
        let entry = r#"{"source":"shm","options":"rw"}"#;
        let list = |count| format!("[{}]", vec![entry; count].join(","));
        assert_eq!(read(&list(MOUNTS)).unwrap().len(), MOUNTS);
        for (json, why) in [
            (list(MOUNTS + 1), "at most 64"),
            (String::new(), "EOF"),
            ("[".repeat(1 << 20), "invalid type"),
            (format!("[{}{entry}]", " ".repeat(LIST_LIMIT as usize)), "EOF"),
            (r#"[{"source":"shm"}]"#.into(), "options"),
            (r#"[{"source":"shm","options":"rw","at":"/etc"}]"#.into(), "unknown field"),
            (r#"[{"source":"s\u0000m","options":"rw"}]"#.into(), "no name"),
        ] {
            let error = read(&json).unwrap_err();
            assert!(error.contains(why), "{error} for {json:.60}");
        }
    }

    #[test]
    fn a_mount_with_other_options_is_not_made() {
        let images = tempfile::tempdir().unwrap();
        let directory = images.path().join("mounts");
        for json in ["[]", r#"[{"source":"shm","options":"rw,context=any"}]"#] {
            fs::write(images.path().join(LIST), json).unwrap();
            let filled = fill(images.path(), &directory);
            nix::mount::umount2(&directory, nix::mount::MntFlags::MNT_DETACH).unwrap();
            match json {
                "[]" => assert_eq!(filled, Ok(0)),
                _ => assert!(filled.unwrap_err().contains("context=any")),
            }
        }
    }
}
