//! A migration: the one crate that knows that a container changes hands.
//!
//! [`depart`] runs in the shim that owns the container, [`arrive`] in the shim
//! that waits for it. Both speak over one [`transship_link::Channel`], and
//! memory travels beside it ([`pages`]). What a container *is* stays behind two
//! traits, [`Source`] and [`Target`], so that both ends also run in one process
//! with fakes (`fake`).
//!
//! ```text
//!   source                                   target
//!   ------                                   ------
//!   OCI runtime started, held at the gate
//!   Manifest          ───────────────────▶   checks the ticket
//!                     ◀───────────────────   Waiting
//!   lanes             ═══════════════════▶
//!   Pass 1..n (runs)  ───────────────────▶   applies
//!                     ◀───────────────────   PassDone; OCI runtime started, held
//!   round 1..n (runs) ═══════════════════▶   puts pages into its store
//!                     ◀───────────────────   RoundDone
//!   freeze
//!   last round        ═══════════════════▶   leaves in the store what exists
//!   last Pass, images ───────────────────▶   restores, and holds every process
//!                                            journal: prepared
//!                     ◀───────────────────   Prepared
//!   journal: committed
//!   Commit            ───────────────────▶   journal: running; releases
//!                     ◀───────────────────   Running; journal: released
//!   journal: departed
//!   ends its tasks    ◀───────────────────   Filled: every page is in its place
//! ```
//!
//! When the rounds end is [`policy`]; what they cost is [`report`].
//!
//! Who may run the container when is `docs/handoff.md`; [`handoff`] makes the
//! wrong order a compile error, and [`decide`] is what both sides' shims and
//! agents conclude from what they know.
#![forbid(unsafe_code)]

#[cfg(test)]
mod both_ends;
mod bulk;
pub mod decide;
mod error;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzz;
pub mod handoff;
mod history;
pub mod journal;
mod limits;
mod line;
mod options;
pub mod pages;
mod phase;
pub mod policy;
mod present;
pub mod report;
mod source;
mod target;

pub use error::{DepartError, MigrationError, chain};
pub use history::History;
pub use journal::Journal;
pub use line::Wanted;
pub use options::{Budget, Codec, Compress, LANES, MAX_LANES, Options, PostCopy, Throttle};
pub use phase::{Phase, Stopwatch};
pub use source::{
    Connect, Connecting, Departure, Doubt, Evidence, Progress, RoundProgress, Source, depart,
    settle,
};
pub use target::{Arrived, Filled, NextConnection, PageStore, Target, arrive};
pub use transship_api::session::{Manifest, Remembered};
