//! Running the OCI runtime (runc or crun): one function per verb.
//!
//! The runtime writes its log as JSON lines into the bundle; when a verb
//! fails, the error lines it has added are the reason we report.

use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use serde::Deserialize;
use tokio::{io::AsyncWriteExt, process::Command};

use crate::{
    error::{Error, Result},
    mounts,
    options::RuntimeOptions,
};

/// Where containerd's own shim keeps runc's state, so that `runc --root` of
/// an operator finds our containers as well.
const DEFAULT_ROOT: &str = "/run/containerd/runc";
const DEFAULT_BINARY: &str = "runc";
/// Of a runtime's log after a failure; its error lines are the last ones.
const LOG_TAIL: u64 = 64 * 1024;

/// Which runtime it is, as far as its command line differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Runc,
    Crun,
}

/// An OCI runtime, set up for the containers of one namespace and the log of
/// one bundle.
#[derive(Debug, Clone)]
pub struct Oci {
    binary: PathBuf,
    root: PathBuf,
    log: PathBuf,
    systemd_cgroup: bool,
}

impl Oci {
    pub fn new(options: &RuntimeOptions, namespace: &str, bundle: &Path) -> Self {
        let or = |given: &str, default: &str| {
            PathBuf::from(if given.is_empty() { default } else { given })
        };
        Self {
            binary: or(&options.binary_name, DEFAULT_BINARY),
            root: or(&options.root, DEFAULT_ROOT).join(namespace),
            log: bundle.join("log.json"),
            systemd_cgroup: options.systemd_cgroup,
        }
    }

    pub fn binary(&self) -> &Path {
        &self.binary
    }

    pub fn kind(&self) -> Kind {
        let name = self.binary.file_name().unwrap_or_default().to_string_lossy();
        if name.contains("crun") { Kind::Crun } else { Kind::Runc }
    }

    /// Whether the runtime keeps state of this container.
    pub fn knows(&self, id: &str) -> bool {
        self.root.join(id).exists()
    }

    /// The runtime with its global options and `verb`; nothing on its stdio.
    /// The caller adds what the verb takes, the id last.
    pub fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root).arg("--log").arg(&self.log);
        command.args(["--log-format", "json"]);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.kill_on_drop(true);
        command
    }

    /// Runs a command that inherits our side of a container's stdio: its exit
    /// is all it tells, its log the reason.
    pub async fn finish(&self, action: &'static str, mut command: Command) -> Result<()> {
        let mark = self.log_mark();
        let mut child = command.spawn().map_err(Error::io(self.doing("start")))?;
        // The command holds the container's ends of its pipes; a reader must
        // see the end of file when the container lets go of its own.
        drop(command);
        let status = child.wait().await.map_err(Error::io(self.doing("wait for")))?;
        self.judge(action, status, mark, &[])
    }

    /// Runs a command and gives back what it printed.
    pub async fn output(&self, action: &'static str, mut command: Command) -> Result<Vec<u8>> {
        let mark = self.log_mark();
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = command.output().await.map_err(Error::io(self.doing("run")))?;
        self.judge(action, output.status, mark, &output.stderr)?;
        Ok(output.stdout)
    }

    pub async fn start(&self, id: &str) -> Result<()> {
        let mut command = self.command("start");
        command.arg(id);
        self.output("start", command).await.map(drop)
    }

    /// Sends `signal` to the first process, or to all of them.
    pub async fn kill(&self, id: &str, signal: u32, all: bool) -> Result<()> {
        let mut command = self.command("kill");
        if all {
            command.arg("--all");
        }
        command.arg(id).arg(signal.to_string());
        self.output("kill", command).await.map(drop)
    }

    pub async fn pause(&self, id: &str) -> Result<()> {
        let mut command = self.command("pause");
        command.arg(id);
        self.output("pause", command).await.map(drop)
    }

    pub async fn resume(&self, id: &str) -> Result<()> {
        let mut command = self.command("resume");
        command.arg(id);
        self.output("resume", command).await.map(drop)
    }

    /// Pids of all processes of the container, in the shim's pid namespace.
    pub async fn ps(&self, id: &str) -> Result<Vec<u32>> {
        let mut command = self.command("ps");
        command.args(["--format", "json"]).arg(id);
        let printed = self.output("ps", command).await?;
        // runc prints `null` for a container without processes.
        serde_json::from_slice::<Option<Vec<u32>>>(&printed)
            .map(Option::unwrap_or_default)
            .map_err(Error::other(format!("decode the process list of {id}")))
    }

    /// Applies `resources` (LinuxResources of the OCI spec, as JSON).
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        let mark = self.log_mark();
        let mut command = self.command("update");
        command.args(["--resources", "-"]).arg(id);
        command.stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(Error::io(self.doing("start")))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A runtime that refuses early does not read; its exit says why.
            let _ = stdin.write_all(resources).await;
        }
        let output = child.wait_with_output().await.map_err(Error::io(self.doing("wait for")))?;
        self.judge("update", output.status, mark, &output.stderr)
    }

    /// Removes the container's state and cgroups. That there is none any more
    /// (the runtime drops it after a checkpoint that stopped the container)
    /// is what we want and no error.
    pub async fn delete(&self, id: &str, force: bool) -> Result<()> {
        self.unmount_restore(id).await?;
        if !self.knows(id) {
            return Ok(());
        }
        let mut command = self.command("delete");
        if force {
            command.arg("--force");
        }
        command.arg(id);
        match self.output("delete", command).await {
            Err(_) if !self.knows(id) => Ok(()),
            done => done.map(drop),
        }
    }

    /// A `restore` that was killed leaves the root filesystem mounted a second
    /// time, in the runtime's own directory (runc) or the bundle (crun). Whoever
    /// removes that directory would remove the container's files with it.
    pub async fn unmount_restore(&self, id: &str) -> Result<()> {
        for directory in [self.root.join(id), self.log.with_file_name("")] {
            let root = directory.join("criu-root");
            if root.exists() {
                mounts::unmount(&root).await?;
                // Gone already, or not empty: then it is not what we came for.
                let _ = fs::remove_dir(&root);
            }
        }
        Ok(())
    }

    /// Where the log ends now; [`said_since`](Self::said_since) starts there.
    pub fn log_mark(&self) -> u64 {
        fs::metadata(&self.log).map_or(0, |log| log.len())
    }

    /// The errors that the runtime has logged since `mark`, joined.
    pub fn said_since(&self, mark: u64) -> Option<String> {
        let mut log = fs::File::open(&self.log).ok()?;
        let end = log.metadata().ok()?.len();
        log.seek(SeekFrom::Start(mark.max(end.saturating_sub(LOG_TAIL)))).ok()?;
        let mut text = String::new();
        log.take(LOG_TAIL).read_to_string(&mut text).ok()?;
        errors_of(&text)
    }

    fn judge(
        &self,
        action: &'static str,
        status: ExitStatus,
        mark: u64,
        stderr: &[u8],
    ) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        let printed = || {
            let text = String::from_utf8_lossy(stderr).trim().to_owned();
            (!text.is_empty()).then_some(text)
        };
        let said = self
            .said_since(mark)
            .or_else(printed)
            .unwrap_or_else(|| format!("{} gave no reason ({status})", self.binary.display()));
        Err(Error::Runtime { action, said })
    }

    fn doing(&self, what: &str) -> String {
        format!("{what} the OCI runtime {}", self.binary.display())
    }
}

#[derive(Deserialize)]
struct LogLine {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

/// The messages of level error; of the last line when there is none.
fn errors_of(log: &str) -> Option<String> {
    let lines = || log.lines().filter_map(|line| serde_json::from_str::<LogLine>(line).ok());
    let errors: Vec<String> = lines()
        .filter(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic"))
        .map(|line| line.msg)
        .collect();
    if errors.is_empty() {
        return lines().next_back().map(|line| line.msg).filter(|msg| !msg.is_empty());
    }
    Some(errors.join("; "))
}

/// Reads the pid that a runtime wrote.
pub fn read_pid(file: &Path) -> Result<i32> {
    let text = fs::read_to_string(file).map_err(Error::io(format!("read {}", file.display())))?;
    match text.trim().parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(Error::Internal(format!("{} holds {text:?}, which is no pid", file.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_gives_the_reason() {
        let log = r#"{"level":"warning","msg":"old kernel","time":"t"}
{"level":"error","msg":"no such file: /bin/nope","time":"t"}
not json
{"level":"error","msg":"exec failed","time":"t"}"#;
        assert_eq!(errors_of(log).as_deref(), Some("no such file: /bin/nope; exec failed"));
        assert_eq!(errors_of("{\"msg\":\"odd\",\"level\":\"info\"}").as_deref(), Some("odd"));
        assert_eq!(errors_of(""), None);
    }

    #[test]
    fn only_new_lines_of_the_log_count() {
        let bundle = tempfile::tempdir().unwrap();
        let oci = Oci::new(&RuntimeOptions::default(), "ns", bundle.path());
        fs::write(bundle.path().join("log.json"), "{\"level\":\"error\",\"msg\":\"old\"}\n")
            .unwrap();
        let mark = oci.log_mark();
        assert_eq!(oci.said_since(mark), None);
        assert_eq!(oci.said_since(0).as_deref(), Some("old"));
    }

    #[tokio::test]
    async fn a_runtime_that_fails_silently_is_named() {
        let bundle = tempfile::tempdir().unwrap();
        let options = RuntimeOptions { binary_name: "/bin/false".into(), ..Default::default() };
        let error = Oci::new(&options, "ns", bundle.path()).start("x").await.unwrap_err();
        let text = error.sentence();
        assert!(text.contains("start failed: /bin/false gave no reason"), "{text}");
        let options = RuntimeOptions { binary_name: "/no/runtime".into(), ..Default::default() };
        let error = Oci::new(&options, "ns", bundle.path()).start("x").await.unwrap_err();
        assert!(error.sentence().contains("/no/runtime"), "{}", error.sentence());
    }

    #[test]
    fn options_choose_the_runtime() {
        let oci = Oci::new(&RuntimeOptions::default(), "k8s.io", Path::new("/b"));
        assert_eq!(
            (oci.kind(), oci.root.as_path()),
            (Kind::Runc, Path::new("/run/containerd/runc/k8s.io"))
        );
        let options = RuntimeOptions {
            binary_name: "/usr/bin/crun".into(),
            root: "/r".into(),
            ..Default::default()
        };
        let oci = Oci::new(&options, "default", Path::new("/b"));
        assert_eq!((oci.kind(), oci.root.as_path()), (Kind::Crun, Path::new("/r/default")));
    }
}
