//! The client's side of a container's standard streams: fifos that host and
//! node see at the same path, or nothing at all.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, bail};
use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::{Node, eventually};

/// What a Create or Exec request says about streams.
#[derive(Debug, Clone, Default)]
pub struct Streams {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

impl Streams {
    /// All output to one URI, as `file://` and `binary://` have it.
    pub fn to_uri(uri: &str) -> Self {
        Self { stdout: uri.into(), stderr: uri.into(), ..Self::default() }
    }
}

/// Fifos and what came out of them.
#[derive(Default)]
pub struct Stdio {
    pub streams: Streams,
    stdin: Option<PathBuf>,
    writer: Mutex<Option<File>>,
    pub stdout: Output,
    pub stderr: Output,
}

/// What a process has written so far.
#[derive(Clone, Default)]
pub struct Output(Arc<Mutex<(Vec<u8>, bool)>>);

impl Stdio {
    /// No streams at all.
    pub fn null() -> Self {
        Self::default()
    }

    /// Output read as it comes, nothing on the input.
    pub fn output(node: &Node) -> Result<Self> {
        Self::fifos(node, false, false)
    }

    /// Input as well; `close_stdin` of the API ends it.
    pub fn with_input(node: &Node) -> Result<Self> {
        Self::fifos(node, true, false)
    }

    pub fn terminal(node: &Node) -> Result<Self> {
        Self::fifos(node, true, true)
    }

    fn fifos(node: &Node, input: bool, terminal: bool) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let dir = node.dir().join(format!("io-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&dir)?;
        let mut io = Self::default();
        io.streams.terminal = terminal;
        if input {
            io.stdin = Some(fifo(&dir, "stdin")?);
            io.streams.stdin = text(io.stdin.as_deref());
        }
        let stdout = fifo(&dir, "stdout")?;
        io.streams.stdout = text(Some(&stdout));
        io.stdout.follow(stdout);
        if !terminal {
            let stderr = fifo(&dir, "stderr")?;
            io.streams.stderr = text(Some(&stderr));
            io.stderr.follow(stderr);
        }
        Ok(io)
    }

    /// Types into the process.
    pub fn send(&self, input: &str) -> Result<()> {
        let path = self.stdin.as_ref().context("made without input")?;
        let mut writer = self.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if writer.is_none() {
            *writer = Some(OpenOptions::new().write(true).open(path)?);
        }
        if let Some(file) = writer.as_mut() {
            file.write_all(input.as_bytes())?;
        }
        Ok(())
    }

    /// The client's end of the input is closed.
    pub fn hang_up(&self) {
        self.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    }
}

impl Output {
    /// Reads in a thread of its own: opening a fifo blocks until the other
    /// side has it, and a process must never wait for its test.
    fn follow(&self, path: PathBuf) {
        let into = Arc::clone(&self.0);
        thread::spawn(move || {
            let Ok(mut file) = File::open(&path) else { return };
            let mut chunk = [0; 65536];
            loop {
                let read = file.read(&mut chunk).unwrap_or_default();
                let mut output = into.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                output.0.extend_from_slice(&chunk[..read]);
                if read == 0 {
                    output.1 = true;
                    return;
                }
            }
        });
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).0.clone()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    /// Waits until it contains `expected`.
    pub fn await_text(&self, expected: &str) -> Result<()> {
        let came = eventually(&format!("{expected:?} in the output"), || {
            Ok(self.text().contains(expected))
        });
        came.with_context(|| format!("the output is {:?}", self.text()))
    }

    /// Waits until every writer has closed it; all that was written.
    pub fn await_end(&self) -> Result<String> {
        let ended = || Ok(self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).1);
        if eventually("the end of the output", ended).is_err() {
            bail!("the output was not closed; so far it is {:?}", self.text());
        }
        Ok(self.text())
    }
}

fn fifo(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)
        .with_context(|| format!("make {}", path.display()))?;
    Ok(path)
}

fn text(path: Option<&Path>) -> String {
    path.map(|path| path.display().to_string()).unwrap_or_default()
}
