//! Terminals: the OCI runtime makes the pty inside the container and sends
//! its master over a socket.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use nix::{
    cmsg_space,
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::{UnixListener, UnixStream},
    time::timeout,
};
use transship_types::paths::RUNTIME_DIR;

use crate::{
    error::{Error, Result},
    pod::private_dir,
    sys,
};

/// The runtime has ended by now and has sent the master before; anything
/// longer than a moment means it never will.
const RECEIVE_LIMIT: Duration = Duration::from_secs(30);

/// A listening socket for one terminal; its path is gone when it is.
pub struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    pub fn bind() -> Result<Self> {
        // Short names: a bundle's path can be longer than sockaddr_un.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = Path::new(RUNTIME_DIR).join("console");
        private_dir(&dir)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("{}-{number}.sock", std::process::id()));
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)
            .map_err(Error::io(format!("listen on the console socket {}", path.display())))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
            .map_err(Error::io(format!("close the console socket {}", path.display())))?;
        Ok(Self { path, listener })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The master that the runtime has sent.
    pub async fn receive(self) -> Result<OwnedFd> {
        let receive = async {
            let (stream, _) = self.listener.accept().await?;
            descriptor(&stream).await
        };
        timeout(RECEIVE_LIMIT, receive)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(Error::io("receive the terminal from the OCI runtime"))
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

async fn descriptor(stream: &UnixStream) -> io::Result<OwnedFd> {
    let receive = || {
        // The runtime sends the pty's name along; nobody needs it.
        let mut name = [0u8; 4096];
        let mut space = cmsg_space!([std::os::fd::RawFd; 1]);
        let mut iov = [io::IoSliceMut::new(&mut name)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
        let got = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        got.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no descriptor came along"))
    };
    stream.readable().await?;
    let fd = stream.async_io(Interest::READABLE, receive).await?;
    Ok(sys::own(fd))
}

/// The master side of a process's terminal.
pub struct Console(AsyncFd<OwnedFd>);

impl Console {
    pub fn new(master: OwnedFd) -> Result<Self> {
        let open = || -> io::Result<Self> {
            let flags = OFlag::from_bits_retain(fcntl(master.as_fd(), FcntlArg::F_GETFL)?);
            fcntl(master.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
            Ok(Self(sys::watch(master, Interest::READABLE | Interest::WRITABLE)?))
        };
        open().map_err(Error::io("watch the terminal"))
    }

    pub fn resize(&self, width: u16, height: u16) -> io::Result<()> {
        sys::resize_terminal(self.0.get_ref().as_fd(), width, height)
    }

    /// Reads some output; None once no process has the terminal any more.
    pub async fn read(&self, limit: usize) -> io::Result<Option<Vec<u8>>> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut buffer = vec![0; limit];
            match ready.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), &mut buffer)?)) {
                Ok(Ok(0)) => return Ok(None),
                Ok(Ok(count)) => {
                    buffer.truncate(count);
                    return Ok(Some(buffer));
                }
                // The last slave was closed.
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::EIO as i32) => {
                    return Ok(None);
                }
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }

    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), bytes)?)) {
                Ok(count) => bytes = &bytes[count?..],
                Err(_would_block) => {}
            }
        }
        Ok(())
    }
}
