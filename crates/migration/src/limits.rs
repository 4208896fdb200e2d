//! How long and how much: every wait and every count has a bound, and a reason.

use std::time::Duration;

/// A peer that has said nothing for this long while it owes us a frame is
/// gone. Longer than a slow disk needs for one file of a pass.
pub const FRAME: Duration = Duration::from_secs(30);

/// A peer that takes not one frame for this long has stopped reading. TCP
/// notices that by itself only where the link has a time limit of its own, and
/// not if a few bytes are taken now and then; a frozen container must not wait.
pub const TAKEN: Duration = Duration::from_secs(30);

/// The target restores between `ImagesEnd` and `Prepared`; CRIU itself gives
/// up on nothing, so this bounds the pause when it hangs.
pub const RESTORE: Duration = Duration::from_secs(120);

/// How long the source waits, frozen, for the answer to its commit before it
/// says "in doubt". The target only has to write one record and let go.
pub const COMMIT: Duration = Duration::from_secs(20);

/// The target waits this long for the source to freeze: as long as the
/// passes over the writable layer may take between two frames.
pub const PASS: Duration = Duration::from_secs(600);

/// CRIU writes a few dozen images per process tree and some per process.
pub const IMAGES: u32 = 100_000;

/// An image name as CRIU writes it: `pages-1.img`, `core-17.img`, `tmpfs-dev-…`.
pub const IMAGE_NAME: usize = 128;

/// Passes over the writable layer while the container runs: more than this
/// and it changes faster than it travels.
pub const PASSES: u32 = 4;

/// A pass that moved less than this is followed by the freeze: the rest
/// travels in a few milliseconds.
pub const SMALL_PASS: u64 = 4 << 20;
