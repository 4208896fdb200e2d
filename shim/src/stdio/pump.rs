//! Copying between a container's ends and a client's.

use std::{
    fs,
    io::{self, Write},
    os::fd::AsFd,
    sync::Arc,
    time::Duration,
};

use tokio::{io::AsyncWriteExt, net::unix::pipe, sync::mpsc, time::sleep};
use tracing::warn;

use super::console::Console;
use crate::sys;

/// One read. Allocated only while there is something to copy: most
/// containers are silent most of the time.
const CHUNK: usize = 32 * 1024;
/// How often a fifo is looked at that nobody has emptied yet.
const LINGER_FIRST: Duration = Duration::from_millis(1);
const LINGER_LONGEST: Duration = Duration::from_millis(100);

pub enum Sink {
    Null,
    /// Opened for reading and writing, see [`super`].
    Fifo(pipe::Sender),
    Pipe(pipe::Sender),
    File(Arc<fs::File>),
    Console(Arc<Console>),
}

impl Sink {
    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Sink::Null => Ok(()),
            Sink::Fifo(to) | Sink::Pipe(to) => to.write_all(bytes).await,
            // To the page cache, like any logger; a thread per line of
            // output would cost more than it spares.
            Sink::File(to) => to.as_ref().write_all(bytes),
            Sink::Console(to) => to.write_all(bytes).await,
        }
    }

    /// Keeps a fifo open until its reader has taken all of it: once the last
    /// descriptor is closed, the kernel drops what nobody has read. A reader
    /// that is away (containerd restarts) finds the end of the output so.
    async fn linger(&self) {
        let Sink::Fifo(fifo) = self else { return };
        let mut pause = LINGER_FIRST;
        while sys::unread(fifo.as_fd()).is_ok_and(|left| left > 0) {
            sleep(pause).await;
            pause = (pause * 2).min(LINGER_LONGEST);
        }
    }
}

/// From the client's fifo to the container, up to the end of file.
pub async fn copy_in(mut from: pipe::Receiver, mut to: Sink) {
    if let Err(error) = copy(&mut from, &mut to).await
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        warn!(%error, "copying stdin ended early");
    }
}

/// From the container's pipe to the client, up to the end of file; drops
/// `copying` then.
pub async fn copy_out(mut from: pipe::Receiver, mut to: Sink, copying: mpsc::Sender<()>) {
    if let Err(error) = copy(&mut from, &mut to).await {
        warn!(%error, "copying output failed; what follows is dropped");
        // A container must not block on a client's full disk.
        let _ = copy(&mut from, &mut Sink::Null).await;
    }
    drop(copying);
    to.linger().await;
}

async fn copy(from: &mut pipe::Receiver, to: &mut Sink) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut buffer = vec![0; CHUNK];
        match from.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&buffer[..count]).await?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// From a terminal to the client, until nobody has the terminal any more.
pub async fn copy_console(from: Arc<Console>, mut to: Sink, copying: mpsc::Sender<()>) {
    loop {
        match from.read(CHUNK).await {
            Ok(Some(bytes)) => {
                if let Err(error) = to.write_all(&bytes).await {
                    warn!(%error, "copying a terminal's output failed; this part is dropped");
                }
            }
            Ok(None) => break,
            Err(error) => {
                warn!(%error, "reading a terminal failed");
                break;
            }
        }
    }
    drop(copying);
    to.linger().await;
}
