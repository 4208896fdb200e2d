//! Where an arriving container's output goes: the kinds are the source's, the
//! fifos are new. A private directory per container holds them, so that
//! `ctr task attach` finds and, on delete, removes them as it does its own.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{fcntl::OFlag, sys::stat::Mode, unistd::mkfifo};
use transship_api::session::Stdio;
use transship_types::ContainerKey;

use super::{ContainerdError, Result};

pub(super) fn directory(root: &Path, key: &ContainerKey) -> PathBuf {
    root.join(key.namespace()).join(key.id())
}

/// What the target's task gets, and the fifos that must exist for it.
pub(super) fn arrange(source: &Stdio, directory: &Path, id: &str) -> (Stdio, Vec<PathBuf>) {
    let mut fifos = Vec::new();
    let mut place = |source: &str, name: &str| {
        if !is_fifo_path(source) {
            return source.to_owned();
        }
        let fifo = directory.join(format!("{id}-{name}"));
        fifos.push(fifo.clone());
        fifo.to_string_lossy().into_owned()
    };
    let stdio = Stdio {
        stdin: place(&source.stdin, "stdin"),
        stdout: place(&source.stdout, "stdout"),
        // A terminal has one output.
        stderr: if source.terminal { String::new() } else { place(&source.stderr, "stderr") },
        terminal: source.terminal,
    };
    (stdio, fifos)
}

/// Clients name a fifo by its bare path; everything else is a URI
/// (`binary://`, `file://`), a device, or nothing.
fn is_fifo_path(stdio: &str) -> bool {
    stdio.starts_with('/') && !stdio.starts_with("/dev/")
}

/// Makes the directory anew: whatever lies there under the name of a
/// container that did not exist is left over.
pub(super) fn make(root: &Path, directory: &Path, fifos: &[PathBuf]) -> Result<()> {
    remove(root, directory)?;
    if fifos.is_empty() {
        return Ok(());
    }
    DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(directory)
        .map_err(|e| ContainerdError::file("create", directory, e))?;
    for fifo in fifos {
        mkfifo(fifo, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|e| ContainerdError::file("create fifo", fifo, e.into()))?;
    }
    Ok(())
}

/// Opens the outputs for reading. containerd's own shim waits at Create until
/// somebody has, and another may at Start; whoever attaches later takes over.
pub(super) fn open_outputs(stdio: &Stdio, fifos: &[PathBuf]) -> Result<Vec<File>> {
    let outputs = fifos.iter().filter(|fifo| **fifo != Path::new(&stdio.stdin));
    outputs
        .map(|fifo| {
            OpenOptions::new()
                .read(true)
                .custom_flags(OFlag::O_NONBLOCK.bits())
                .open(fifo)
                .map_err(|e| ContainerdError::file("open", fifo, e))
        })
        .collect()
}

/// Removes the container's directory, and its namespace's if that was the last.
pub(super) fn remove(root: &Path, directory: &Path) -> Result<()> {
    absent_is_fine(fs::remove_dir_all(directory))
        .map_err(|e| ContainerdError::file("remove", directory, e))?;
    if let Some(namespace) = directory.parent().filter(|parent| *parent != root) {
        remove_if_empty(namespace);
    }
    Ok(())
}

/// Removes a client's fifos once their task is gone, as containerd's own
/// client does when it deletes a task: nobody else would.
pub(super) fn remove_fifos_of(stdio: &Stdio) {
    for path in [&stdio.stdin, &stdio.stdout, &stdio.stderr] {
        let path = Path::new(path);
        let is_fifo = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_fifo());
        if !is_fifo {
            continue;
        }
        if let Err(error) = absent_is_fine(fs::remove_file(path)) {
            tracing::warn!(fifo = %path.display(), %error, "a fifo stays behind");
        }
        if let Some(directory) = path.parent() {
            remove_if_empty(directory);
        }
    }
}

/// Others may have put something there: then it stays, and that is right.
fn remove_if_empty(directory: &Path) {
    let _ = fs::remove_dir(directory);
}

fn absent_is_fine(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn stdio(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Stdio {
        Stdio { stdin: stdin.into(), stdout: stdout.into(), stderr: stderr.into(), terminal }
    }

    #[test]
    fn each_kind_of_stdio_stays_its_kind() {
        let here = Path::new("/f");
        for (source, wanted, fifos) in [
            (stdio("", "", "", false), stdio("", "", "", false), 0),
            (
                stdio("/run/containerd/fifo/1/c-stdin", "/x/out", "/x/err", false),
                stdio("/f/c-stdin", "/f/c-stdout", "/f/c-stderr", false),
                3,
            ),
            (
                stdio("/x/in", "/x/out", "/x/err", true),
                stdio("/f/c-stdin", "/f/c-stdout", "", true),
                2,
            ),
            (
                stdio("", "file:///var/log/c", "binary:///usr/bin/log?a=b", false),
                stdio("", "file:///var/log/c", "binary:///usr/bin/log?a=b", false),
                0,
            ),
            (stdio("/dev/null", "/x", "", false), stdio("/dev/null", "/f/c-stdout", "", false), 1),
        ] {
            let (arranged, made) = arrange(&source, here, "c");
            assert_eq!(arranged, wanted);
            assert_eq!(made.len(), fifos, "{source:?}");
        }
    }

    #[test]
    fn fifos_are_private_and_leave_nothing() {
        let top = tempfile::tempdir().unwrap();
        let root = top.path().join("fifo");
        let key = ContainerKey::new("default", "redis").unwrap();
        let directory = directory(&root, &key);
        let (stdio, fifos) = arrange(&stdio("", "/out", "/err", false), &directory, key.id());
        for _ in ["first", "left over from the first"] {
            make(&root, &directory, &fifos).unwrap();
            assert!(fs::metadata(&stdio.stdout).unwrap().file_type().is_fifo());
            assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
        }
        remove(&root, &directory).unwrap();
        remove(&root, &directory).unwrap();
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }

    #[test]
    fn only_fifos_of_a_client_are_removed() {
        let top = tempfile::tempdir().unwrap();
        let directory = top.path().join("123");
        fs::create_dir(&directory).unwrap();
        let (fifo, file) = (directory.join("out"), directory.join("log"));
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        fs::write(&file, "kept").unwrap();
        let text = |path: &Path| path.to_string_lossy().into_owned();
        remove_fifos_of(&stdio("", &text(&fifo), &text(&file), false));
        assert!(!fifo.exists() && file.exists());
    }
}
