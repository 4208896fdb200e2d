//! How memory may travel, as far as people decide it: the words and bounds
//! that the command line, the configuration and the agent check against.

use std::{ops::RangeInclusive, time::Duration};

/// Whether a container that writes faster than the link is slowed down.
pub const THROTTLE: [&str; 2] = ["auto", "never"];
/// Whether a container may run before all of its memory is there.
pub const POST_COPY: [&str; 3] = ["never", "auto", "always"];
/// How pages are compressed.
pub const COMPRESS: [&str; 4] = ["auto", "never", "lz4", "zstd"];
/// Connections for pages. Each one is a thread on either side.
pub const LANES: RangeInclusive<u32> = 1..=16;
/// Below it no round ever ends early enough; above it there is nothing to aim
/// at.
pub const MAX_PAUSE: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(60);
