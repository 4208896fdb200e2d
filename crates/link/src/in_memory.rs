//! A link that never leaves the process, for tests of whatever talks over
//! one: same frames, no TLS, no hello.

use tokio::io::duplex;
use transship_types::NodeName;

use crate::Channel;

/// Like a socket's buffer: a writer meets back-pressure when nobody reads.
const BUFFER: usize = 256 << 10;

/// The end that node `a` holds, then the one that node `b` holds. Dropping
/// one is a cut link for the other.
pub fn pair(a: NodeName, b: NodeName) -> (Channel, Channel) {
    let (at_a, at_b) = duplex(BUFFER);
    (Channel::over(at_a, b), Channel::over(at_b, a))
}

#[cfg(test)]
mod tests {
    use transship_wire::WireError;

    use super::*;

    #[tokio::test]
    async fn each_end_names_the_other_and_a_drop_is_a_cut() {
        let (mut at_a, mut at_b) = pair("a".parse().unwrap(), "b".parse().unwrap());
        assert_eq!((at_a.peer.as_str(), at_b.peer.as_str()), ("b", "a"));
        at_a.writer.data(b"x").await.unwrap();
        assert_eq!(at_b.reader.data().await.unwrap().unwrap(), &b"x"[..]);
        drop(at_a);
        assert!(matches!(at_b.reader.next().await, Err(WireError::Closed)));
    }
}
