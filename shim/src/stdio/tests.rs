use std::{io::Read, path::PathBuf};

use nix::{sys::stat::Mode, unistd::mkfifo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

fn key() -> ContainerKey {
    ContainerKey::new("test", "stdio").unwrap()
}

fn fifo(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    path
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Runs a shell script the way the OCI runtime would be run.
async fn run(prepared: Prepared, script: &str) -> Live {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    prepared.attach(&mut command).unwrap();
    let mut child = command.spawn().unwrap();
    drop(command);
    let live = prepared.connect().await.unwrap();
    child.wait().await.unwrap();
    live
}

#[tokio::test]
async fn output_waits_in_the_fifo_for_a_reader() {
    let dir = tempfile::tempdir().unwrap();
    let out = fifo(dir.path(), "out");
    let urls = Urls { stdout: text(&out), ..Default::default() };
    let prepared = Prepared::open(&key(), &urls, Owner::default()).await.unwrap();
    let live = run(prepared, "echo to stdout; echo to stderr >&2").await;
    // The process is gone and nobody has read: the reader comes only now.
    let mut reader = pipe::OpenOptions::new().open_receiver(&out).unwrap();
    let mut seen = String::new();
    reader.read_to_string(&mut seen).await.unwrap();
    assert_eq!(seen, "to stdout\n");
    live.drain().await;
}

#[tokio::test]
async fn stdin_ends_when_it_is_closed_and_not_when_a_client_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (fifo(dir.path(), "in"), fifo(dir.path(), "out"));
    let urls = Urls { stdin: text(&input), stdout: text(&out), ..Default::default() };
    let mut reader = pipe::OpenOptions::new().open_receiver(&out).unwrap();
    let prepared = Prepared::open(&key(), &urls, Owner::default()).await.unwrap();
    let mut command = Command::new("/bin/cat");
    prepared.attach(&mut command).unwrap();
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut live = prepared.connect().await.unwrap();
    for line in ["one\n", "two\n"] {
        let mut client = pipe::OpenOptions::new().open_sender(&input).unwrap();
        client.write_all(line.as_bytes()).await.unwrap();
        drop(client);
        let mut seen = vec![0; line.len()];
        reader.read_exact(&mut seen).await.unwrap();
        assert_eq!(seen, line.as_bytes());
    }
    live.close_stdin();
    assert!(child.wait().await.unwrap().success());
    live.drain().await;
}

#[tokio::test]
async fn a_file_takes_both_outputs_and_is_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("deep/log");
    let url = format!("file://{}", log.display());
    let urls = Urls { stdout: url.clone(), stderr: url, ..Default::default() };
    for _ in 0..2 {
        let prepared = Prepared::open(&key(), &urls, Owner::default()).await.unwrap();
        run(prepared, "echo out; echo err >&2").await.drain().await;
    }
    let mut lines: Vec<String> =
        fs::read_to_string(log).unwrap().lines().map(String::from).collect();
    lines.sort();
    assert_eq!(lines, ["err", "err", "out", "out"]);
}

#[tokio::test]
async fn a_log_driver_gets_both_outputs_and_the_names() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let driver = dir.path().join("driver");
    let script = "#!/bin/sh\nexec 5>&-\n/bin/cat <&3 >$1\n/bin/cat <&4 >>$1\n\
                  echo $CONTAINER_NAMESPACE/$CONTAINER_ID >>$1\n";
    fs::write(&driver, script).unwrap();
    fs::set_permissions(&driver, fs::Permissions::from_mode(0o755)).unwrap();
    let log = dir.path().join("log");
    let url = format!("binary://{}?{}", driver.display(), log.display());
    let urls = Urls { stdout: url.clone(), stderr: url, ..Default::default() };
    let prepared = Prepared::open(&key(), &urls, Owner::default()).await.unwrap();
    run(prepared, "echo out; echo err >&2").await.drain().await;
    let mut seen = String::new();
    fs::File::open(log).unwrap().read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "out\nerr\ntest/stdio\n");
}

#[tokio::test]
async fn a_log_driver_that_is_not_there_is_named() {
    let urls = Urls { stdout: "binary:///no/driver".into(), ..Default::default() };
    let error = Prepared::open(&key(), &urls, Owner::default()).await.err().unwrap();
    assert!(error.sentence().contains("/no/driver"), "{}", error.sentence());
}
