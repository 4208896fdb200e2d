//! What a connection may take before it is known whose it is, and why so much.

use std::time::Duration;

/// For a TCP connection: three SYNs (1 s, 3 s) and a little.
pub const CONNECT: Duration = Duration::from_secs(5);

/// For a whole ClientHello, which a peer sends at once.
pub const FIRST: Duration = Duration::from_secs(5);

/// Bytes of a ClientHello. Ours have 300, the largest in use (post-quantum key
/// shares) under two kilobytes. Also within a socket's smallest receive
/// buffer, so that a hello that fits here can always be peeked whole.
pub const CLIENT_HELLO: usize = 4096;

/// For TLS and hello together. Two round trips; the rest is for a machine
/// that is short of CPU.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// Bytes of a hello: a number, a node's name, and a line of text for people.
pub const HELLO: usize = 4096;

/// How long a refused peer gets to read why.
pub const LINGER: Duration = Duration::from_secs(1);
