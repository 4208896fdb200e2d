//! Who is at the other end of a local socket, as the kernel saw it when the
//! connection was made.
//!
//! Every socket here lies where only root gets to it. This is the second
//! look, for the day on which somebody has changed a mode.

use std::{fmt, io, os::fd::AsFd};

use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::geteuid,
};

use crate::sys;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub pid: i32,
    pub uid: u32,
    /// The primary one and the others.
    pub groups: Vec<u32>,
}

impl Peer {
    pub fn of(socket: &impl AsFd) -> io::Result<Peer> {
        let credentials = getsockopt(socket, PeerCredentials)?;
        let mut groups = sys::peer_groups(socket)?;
        groups.push(credentials.gid());
        Ok(Peer { pid: credentials.pid(), uid: credentials.uid(), groups })
    }

    /// Root, the user we run as, or a member of `group`.
    pub fn may_enter(&self, group: Option<u32>) -> bool {
        let ours = self.uid == 0 || self.uid == geteuid().as_raw();
        ours || group.is_some_and(|group| self.groups.contains(&group))
    }

    /// The same for a connection, which says no if nothing is known of it.
    pub fn enters(socket: &impl AsFd, group: Option<u32>) -> Result<Peer, Stranger> {
        match Peer::of(socket) {
            Ok(peer) if peer.may_enter(group) => Ok(peer),
            Ok(peer) => Err(Stranger(Some(peer))),
            Err(_) => Err(Stranger(None)),
        }
    }
}

/// Somebody who has no business on a socket.
#[derive(Debug)]
pub struct Stranger(Option<Peer>);

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(Peer { pid, uid, .. }) => write!(f, "user {uid} (process {pid})"),
            None => f.write_str("somebody of whom the kernel says nothing"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn root_we_ourselves_and_the_group_may_enter() {
        let peer = |uid, groups: &[u32]| Peer { pid: 1, uid, groups: groups.into() };
        for (peer, group, enters) in [
            (peer(0, &[0]), None, true),
            (peer(geteuid().as_raw(), &[5]), None, true),
            (peer(65534, &[5, 0]), None, false),
            (peer(65534, &[5, 7]), Some(7), true),
            (peer(65534, &[5, 0]), Some(7), false),
        ] {
            assert_eq!(peer.may_enter(group), enters, "{peer:?} {group:?}");
        }
    }

    #[test]
    fn the_kernel_knows_us() {
        let (near, _far) = UnixStream::pair().unwrap();
        let peer = Peer::enters(&near, None).unwrap();
        assert_eq!(peer.pid, std::process::id().cast_signed());
        assert!(peer.groups.contains(&nix::unistd::getegid().as_raw()));
        let ours = nix::unistd::getgroups().unwrap();
        assert!(ours.iter().all(|group| peer.groups.contains(&group.as_raw())));
    }
}
