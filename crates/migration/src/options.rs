//! How memory is to travel: what whoever asks for a migration may choose.

use std::{sync::Arc, time::Duration};

pub use transship_memory::codec::{Codec, Compress};

use crate::pages::RateLimit;

/// The pause that rounds aim at unless told otherwise: people do not notice
/// it, and no protocol's time-out does.
pub const MAX_PAUSE: Duration = Duration::from_millis(100);

/// Connections for pages unless told otherwise. One core encrypts about as
/// fast as a fast link takes; two leave a little to spare.
pub const LANES: u32 = 2;

/// More would help no link, and each costs a thread on both sides.
pub const MAX_LANES: u32 = 16;

/// Whether a container that writes faster than the link carries may be slowed
/// down for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Throttle {
    #[default]
    Auto,
    Never,
}

/// Whether a container may run on the target before all its memory is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PostCopy {
    #[default]
    Never,
    /// Only if nothing else brings the pause below the budget.
    Auto,
    Always,
}

/// What a departure may cost, and by which means it may get there.
#[derive(Debug, Clone)]
pub struct Budget {
    pub max_pause: Duration,
    /// What a pause costs even if not one page is left to send: a median of
    /// earlier ones. More rounds do not make it smaller.
    pub fixed: Duration,
    /// For so long of it pages can be sent at no cost: CRIU is busy beside it.
    pub beside: Duration,
    pub throttle: Throttle,
    pub post_copy: PostCopy,
}

/// A pause without pages on machines like those this was written on, until
/// there is a [`History`](crate::History) to tell it better.
const FIXED: Duration = Duration::from_millis(60);

/// The same for the time that CRIU takes for its images.
const BESIDE: Duration = Duration::from_millis(15);

impl Default for Budget {
    fn default() -> Self {
        Self {
            max_pause: MAX_PAUSE,
            fixed: FIXED,
            beside: BESIDE,
            throttle: Throttle::default(),
            post_copy: PostCopy::default(),
        }
    }
}

/// How the memory of one departure travels.
#[derive(Debug, Clone)]
pub struct Options {
    pub budget: Budget,
    /// 0: all pages travel in CRIU's images.
    pub lanes: u32,
    /// For all lanes together; whoever keeps it can change it meanwhile.
    pub limit: Arc<RateLimit>,
    pub compress: Compress,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            budget: Budget::default(),
            lanes: LANES,
            limit: Arc::new(RateLimit::new(0)),
            compress: Compress::default(),
        }
    }
}
