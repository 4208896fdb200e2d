//! How long and how much: every wait and every count has a bound, and a reason.

use std::time::Duration;

/// A peer that has said nothing for this long while it owes us a frame is
/// gone. Longer than a slow disk needs for one file of a pass.
pub const FRAME: Duration = Duration::from_secs(30);

/// A peer that takes not one frame for this long has stopped reading. TCP
/// notices that by itself only where the link has a time limit of its own, and
/// not if a few bytes are taken now and then; a frozen container must not wait.
pub const TAKEN: Duration = Duration::from_secs(30);

/// Bytes of a message between shims. The largest are a bundle of small images
/// (1 MiB and names), a manifest, and [`PRESENT_CHUNK`] ranges.
pub const MESSAGE: usize = 2 << 20;

/// Bytes of a message on a lane: a batch of 256 pages, no two side by side,
/// takes 4 KiB.
pub const LANE_MESSAGE: usize = 16 << 10;

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
pub const IMAGES: usize = 100_000;

/// An image name as CRIU writes it: `pages-1.img`, `core-17.img`, `tmpfs-dev-…`.
/// How many bytes all images have is bounded by the tmpfs that they lie in.
pub const IMAGE_NAME: usize = 128;

/// An image up to this size shares its message with others.
pub const SMALL_IMAGE: u64 = 64 << 10;

/// Passes over the writable layer while the container runs: more than this
/// and it changes faster than it travels.
pub const PASSES: u32 = 4;

/// A pass that moved less than this is followed by the freeze: the rest
/// travels in a few milliseconds.
pub const SMALL_PASS: u64 = 4 << 20;

/// Lanes follow `Waiting`; each is TCP and TLS on a link that works.
pub const LANE: Duration = Duration::from_secs(20);

/// A round that takes longer is told apart from a source that died.
pub const ALIVE: Duration = Duration::from_secs(10);

/// The last batch has been written before its round is said to be complete;
/// what a slow link still holds of it has this long to come.
pub const ROUND: Duration = Duration::from_secs(60);

/// Of all present sets together. A range takes some 60 bytes here; memory of
/// 32 GiB in which every second page exists has half as many.
pub const PRESENT_RANGES: usize = 8 << 20;

/// Ranges in one message: at most 20 bytes each on the wire, so that the
/// message stays below the limit of a frame.
pub const PRESENT_CHUNK: usize = 100_000;

/// Processes and shared objects of one container.
pub const SPACES: usize = 100_000;

/// How long the source waits to hear that the target's pages are in place.
/// What depends on it are figures in a report.
pub const FILLED: Duration = Duration::from_secs(30);

/// While pages are owed and the target is not reached: after this long it is a
/// doubt, which the agents follow up and a person may end. The container runs
/// there, or waits for pages, and nothing is lost by it.
pub const OWED: Duration = Duration::from_secs(60);

/// For the source to hear that nothing is owed any more, however often it has
/// to come back for that. Longer than it takes to be in doubt: then the agents
/// have it.
pub const TOLD: Duration = Duration::from_secs(120);

/// Between two tries to reach the target while pages are owed.
pub const AGAIN: Duration = Duration::from_secs(1);

/// What the target says when it fails is worth so long a wait for a source
/// whose lanes broke.
pub const REASON: Duration = Duration::from_secs(2);

/// After a first round of this length the layer has changed as well.
pub const LONG_ROUND: Duration = Duration::from_secs(2);
