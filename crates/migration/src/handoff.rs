//! The hand-over as types: who may run the container, step by step.
//!
//! ```text
//!             promise()                 Accepted
//!   Frozen ─────────────▶ Promised ───────────────▶ Departed   (ends its tasks)
//!     │  (journal first)      │ Refused
//!     │ drop, stay_home()     ├────────────────────▶ StayedHome (thawed)
//!     ▼                       │ Silence
//!   runs on here              ├────────────────────▶ InDoubt    (stays frozen)
//!                             │ Accepted, and pages are owed
//!                             └──▶ Owing ──────────▶ Departed   (paid)
//!                                    └─────────────▶ InDoubt    (not paid)
//! ```
//!
//! A [`Frozen`] container is promised to nobody: it can only be thawed or
//! promised. A [`Promised`] one cannot be thawed any more by this side alone.

use crate::{MigrationError, Source, decide, journal::Committed};

/// Stopped, promised to nobody. Whoever holds it must call [`Frozen::stay_home`]
/// or [`Frozen::promise`]; a process that dies instead has the effect of the
/// former, because CRIU's socket closes and CRIU lets the tasks run again.
#[must_use = "a frozen container must be thawed or promised"]
pub struct Frozen<'a, S: Source>(&'a mut S);

impl<'a, S: Source> Frozen<'a, S> {
    /// The container has been frozen by the caller just now.
    pub(crate) fn new(source: &'a mut S) -> Self {
        Self(source)
    }

    /// Nothing was promised: run on here.
    pub async fn stay_home(self) -> Result<(), MigrationError> {
        self.0.thaw().await
    }

    /// The commit is on disk; from here on only the target's answer decides.
    /// The proofs are that it was written, and that the tasks stand still
    /// even if this process dies.
    pub fn promise(self, _written: Committed, _guarded: Guarded) -> Promised<'a, S> {
        Promised(self.0)
    }
}

/// Proof that the tasks stand still whoever dies.
#[derive(Debug)]
pub struct Guarded(());

/// Makes them stand still, whoever dies. Not undone but by a thaw.
pub(crate) async fn guard<S: Source>(source: &mut S) -> Result<Guarded, MigrationError> {
    source.guard().await.map(|()| Guarded(()))
}

/// The commit may have been sent: this side must not run the container.
#[must_use = "a promised container must be settled"]
pub struct Promised<'a, S: Source>(&'a mut S);

/// It runs on the target, and needs what this side still has: the tasks here
/// neither run nor end.
#[must_use = "a container whose pages are owed must be settled"]
pub struct Owing<'a, S: Source>(&'a mut S);

/// Proof that the target has every page, on its own word.
#[derive(Debug)]
pub struct Paid(());

impl Paid {
    /// The target has said so.
    pub(crate) fn heard() -> Self {
        Self(())
    }
}

impl<S: Source> Owing<'_, S> {
    /// Nothing is needed here any more.
    pub async fn paid(self, _proof: Paid) -> (Ending, Result<(), MigrationError>) {
        (Ending::Departed, self.0.leave().await)
    }

    /// The target is not reached, or lost it: what is here stays as it is.
    pub fn in_doubt(self) -> Ending {
        Ending::InDoubt
    }
}

/// What came back after the commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The target runs it.
    Accepted,
    /// The target does not run it and never will; it says so itself.
    Refused,
    /// Nothing, or nothing that proves either.
    Silence,
}

/// The three endings of a migration that froze its container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It runs on the target; the tasks here have ended.
    Departed,
    /// It runs here.
    StayedHome,
    /// It is frozen here, and may run there.
    InDoubt,
}

impl Ending {
    pub fn as_str(self) -> &'static str {
        match self {
            Ending::Departed => "departed",
            Ending::StayedHome => "stayed-home",
            Ending::InDoubt => "in-doubt",
        }
    }
}

impl<'a, S: Source> Promised<'a, S> {
    /// A container that was left frozen because the answer did not come.
    pub(crate) fn in_doubt(source: &'a mut S) -> Self {
        Self(source)
    }

    /// It runs on the target, before all of its pages are there.
    pub fn owe(self) -> Owing<'a, S> {
        Owing(self.0)
    }

    /// The answer decides the ending; the result says whether what follows
    /// from it here went well.
    pub async fn settle(self, answer: Answer) -> (Ending, Result<(), MigrationError>) {
        let ending = decide::after_answer(&answer);
        let done = match ending {
            Ending::Departed => self.0.leave().await,
            Ending::StayedHome => self.0.thaw().await,
            Ending::InDoubt => Ok(()),
        };
        (ending, done)
    }
}
