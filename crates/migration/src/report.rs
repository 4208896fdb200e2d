//! What became of the memory: figures for the report, as plain values.
//!
//! Names follow `MemoryReport` of `proto/control.proto`, and that follows
//! QEMU's `query-migrate`.

use std::time::Duration;

use transship_memory::Backend;

use crate::pages::RoundTotals;

/// How the memory of one container travelled.
#[derive(Debug, Clone)]
pub struct Memory {
    pub backend: Backend,
    /// CRIU saved no page that travelled by lane.
    pub page_less: bool,
    /// The target ran it before every page was in its place.
    pub lazy: bool,
    /// Why CRIU saved the pages itself, if it did.
    pub fallback: Option<String>,
    pub lanes: u32,
    /// Bytes on the lanes, headers included, before encryption.
    pub transferred: u64,
    /// Bytes that existed at the freeze.
    pub total: u64,
    /// Pages sent as nothing but zeros, and with content.
    pub duplicate: u64,
    pub normal: u64,
    /// Bytes saved by compression.
    pub compressed: u64,
    /// Pages per second, before the container was slowed down.
    pub dirty_pages_rate: u64,
    pub cpu_throttle_percentage: u32,
    /// As predicted when the freeze was decided on.
    pub expected_downtime: Duration,
    pub rounds: Vec<Round>,
    pub pause: Pause,
    /// Missing if the target's word of it did not come in time.
    pub fill: Option<Fill>,
    /// Pages that CRIU saved itself.
    pub criu_pages: u64,
    /// Bytes of shared objects that came by lane and are what CRIU restored.
    pub shared_bytes: u64,
    /// Present if it ran on the target before all of its pages were there.
    pub post_copy: Option<PostCopy>,
    /// Of these: in objects that CRIU was given, and did not fill.
    pub given_bytes: u64,
}

impl Memory {
    pub(crate) fn new(backend: Backend, lanes: u32) -> Self {
        Self {
            backend,
            page_less: false,
            lazy: false,
            fallback: None,
            lanes,
            transferred: 0,
            total: 0,
            duplicate: 0,
            normal: 0,
            compressed: 0,
            dirty_pages_rate: 0,
            cpu_throttle_percentage: 0,
            expected_downtime: Duration::ZERO,
            rounds: Vec::new(),
            pause: Pause::default(),
            fill: None,
            criu_pages: 0,
            shared_bytes: 0,
            post_copy: None,
            given_bytes: 0,
        }
    }

    pub(crate) fn add(&mut self, round: Round, totals: &RoundTotals) {
        self.transferred += totals.wire_bytes;
        self.duplicate += totals.zero_pages;
        self.normal += totals.pages;
        self.compressed += totals.compressed_saved;
        self.rounds.push(Round {
            zero_pages: totals.zero_pages,
            wire_bytes: totals.wire_bytes,
            ..round
        });
    }
}

/// One round; the last one is that of the pause.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Round {
    pub number: u32,
    pub dirty_pages: u64,
    pub zero_pages: u64,
    pub wire_bytes: u64,
    pub scan: Duration,
    /// From the scan to the last byte on its way.
    pub duration: Duration,
}

/// What the pause was spent on. Parts overlap: their sum is not the pause.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pause {
    pub freeze: Duration,
    pub final_scan: Duration,
    pub final_send: Duration,
    pub dump: Duration,
    pub transfer: Duration,
    /// By the target's clock.
    pub restore: Duration,
    /// The same.
    pub resume: Duration,
}

/// Pages that followed after it ran on the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PostCopy {
    /// Owed at the freeze.
    pub pages: u64,
    /// How often somebody there waited for some, and what that brought.
    pub requests: u64,
    pub request_bytes: u64,
    /// Connections after the first.
    pub recoveries: u32,
    /// Until the target had them all.
    pub duration: Duration,
}

/// How the target put the pages in their places.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fill {
    pub faults: u64,
    /// Upper bounds 16 µs, 32 µs, ... each twice the one before; the last has
    /// none.
    pub fault_latency: Vec<u64>,
    pub pages: u64,
    pub duration: Duration,
}

/// What a restore made of the pages, told by the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restored {
    /// Pages are still to be put in their places while it runs.
    pub lazy: bool,
    /// Pages that came in CRIU's own images.
    pub criu_pages: u64,
    /// As in [`Memory`].
    pub shared_bytes: u64,
    pub given_bytes: u64,
}
