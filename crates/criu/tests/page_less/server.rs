//! The smallest server of lazy pages: one page per fault, one thread per
//! process.

use std::{
    collections::HashMap,
    io::{IoSliceMut, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use transship_types::PageSet;

use crate::sys;

/// Pages by address.
pub type Memory = HashMap<u64, Vec<u8>>;

/// "Finished", instead of a process id.
const RESTORED: i32 = 0x5253_5446;

pub struct Server(Arc<AtomicUsize>);

impl Server {
    pub fn served(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

pub fn start(
    work: &Path,
    mut memory: HashMap<u32, Memory>,
    lazy: HashMap<u32, PageSet>,
) -> Result<Server> {
    for (vpid, pages) in &mut memory {
        pages.retain(|page, _| lazy[vpid].contains(*page));
    }
    let listener = UnixListener::bind(work.join("lazy-pages.socket"))?;
    let served = Arc::new(AtomicUsize::new(0));
    let count = served.clone();
    thread::spawn(move || {
        let (mut criu, _) = listener.accept().expect("CRIU");
        while let Ok(Some((vpid, uffd))) = next(&mut criu) {
            let memory = memory.remove(&(vpid as u32)).expect("a process we know");
            let count = count.clone();
            thread::spawn(move || sys::serve(uffd, &memory, &count));
        }
    });
    Ok(Server(served))
}

fn next(criu: &mut UnixStream) -> Result<Option<(i32, OwnedFd)>> {
    let mut number = [0; 4];
    criu.read_exact(&mut number)?;
    let vpid = i32::from_ne_bytes(number);
    if vpid == RESTORED {
        return Ok(None);
    }
    let mut space = nix::cmsg_space!(i32);
    let mut byte = [0];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(criu.as_raw_fd(), &mut buffers, Some(&mut space), flags)?;
    let fds = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    Ok(Some((vpid, sys::received(fds.context("no descriptor")?))))
}
