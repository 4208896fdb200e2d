//! One end of CRIU's RPC: whole packets, with the descriptors they carry.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

/// A packet larger than this is not CRIU's RPC. The kernel's default send
/// buffer (212992 bytes) is below it, so nobody can send more by accident.
pub const MAX_PACKET: usize = 256 << 10;

#[derive(Debug, Default)]
pub struct Packet {
    pub bytes: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

impl Packet {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, descriptors: Vec::new() }
    }
}

/// A SOCK_SEQPACKET socket under tokio. Both calls are one system call, so a
/// cancelled one has done nothing.
#[derive(Debug)]
pub struct Socket(AsyncFd<OwnedFd>);

impl Socket {
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        sys::watch(socket).map(Self)
    }

    /// `None`: the other end is closed.
    pub async fn receive(&self) -> io::Result<Option<Packet>> {
        self.0
            .async_io(Interest::READABLE, |socket| sys::receive(socket.as_fd(), MAX_PACKET, false))
            .await
    }

    pub async fn send(&self, packet: &Packet) -> io::Result<()> {
        self.0.async_io(Interest::WRITABLE, |socket| sys::send(socket.as_fd(), packet, false)).await
    }

    pub async fn accept(&self) -> io::Result<Socket> {
        let socket =
            self.0.async_io(Interest::READABLE, |socket| sys::accept(socket.as_fd())).await?;
        Socket::new(socket)
    }

    /// Who made the other end, as the kernel saw it.
    pub fn peer(&self) -> io::Result<(i32, u32)> {
        sys::peer(self.0.get_ref().as_fd())
    }
}
