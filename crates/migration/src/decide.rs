//! What comes next: the decisions of the hand-over, without input or output.
//!
//! Shims and agents look, ask and write down; what follows from what they
//! know is decided here. The model (`crates/model`) calls the same functions
//! with every order of messages, losses and crashes, so that what it has
//! checked is what runs.
//!
//! Each function belongs to one of four: the shim that gives the container
//! away, the shim that takes it, and the agents beside them.

use serde::{Deserialize, Serialize};
use transship_types::Epoch;

use crate::{
    handoff::{Answer, Ending},
    journal::State,
};

// --- the shim of the source ------------------------------------------------

/// What an answer to the commit leads to. Only the target's own word proves
/// anything.
pub fn after_answer(answer: &Answer) -> Ending {
    match answer {
        Answer::Accepted => Ending::Departed,
        Answer::Refused => Ending::StayedHome,
        Answer::Silence => Ending::InDoubt,
    }
}

/// What the word that it runs there leads to, if pages of it may be owed: then
/// this copy stays as it is until they are all there (`None`).
pub fn after_running(owes: bool) -> Option<Ending> {
    (!owes).then_some(Ending::Departed)
}

/// How the journal calls an ending. A doubt stays `committed`.
pub fn recorded(ending: Ending) -> Option<State> {
    match ending {
        Ending::Departed => Some(State::Departed),
        Ending::StayedHome => Some(State::Aborted),
        Ending::InDoubt => None,
    }
}

// --- the shim of the target ------------------------------------------------

/// What the source may say to a container that is restored and held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    Commit(Epoch),
    /// It gives up, says something else, or nothing any more.
    Other,
}

/// Whether the held container is let go. Otherwise it is discarded: until
/// then the source has not given it away, or will ask.
pub fn may_run(offered: Epoch, word: Word) -> bool {
    word == Word::Commit(offered)
}

/// Whether the source may be told that the container never will run here: a
/// refusal thaws it there.
pub fn may_refuse(nothing_is_left: bool) -> bool {
    nothing_is_left
}

// --- the agent of the target -----------------------------------------------

/// What this side's shim has written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Journaled {
    /// It had not begun, or it knew the ending.
    Absent,
    Last(State),
    /// It cannot be read, so nothing follows from it.
    Damaged,
}

/// The container, as the daemon of the target shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Seen {
    Runs,
    /// It has ended; with a process there once was one that ran.
    Ended {
        had_process: bool,
    },
    /// Its start has not come back.
    Unborn,
    Gone,
    /// The daemon does not answer.
    Silent,
}

/// What has become of an arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Became {
    /// It runs here, or has run here to its end.
    Arrived,
    /// It does not run here and never will, once what is left is removed.
    Never,
    /// It is not certain yet.
    Open,
    /// The records that would tell are damaged: a person has to look.
    Unknowable,
}

/// What became of an arrival whose agent was not there, or got no answer.
///
/// `leased`: what was made for it has been neither kept nor undone. `late`:
/// every deadline of the shims has passed.
pub fn became(seen: Seen, leased: bool, journaled: Journaled, late: bool) -> Became {
    let let_go =
        matches!(journaled, Journaled::Last(State::Running | State::Owing | State::Released));
    if !leased && !let_go && journaled != Journaled::Damaged {
        // Undone already: a container of this name is another one.
        return Became::Never;
    }
    match (seen, journaled) {
        (Seen::Silent, _) => Became::Open,
        (Seen::Runs | Seen::Ended { had_process: true }, _) => Became::Arrived,
        (Seen::Unborn, _) if late => Became::Never,
        (Seen::Unborn, _) => Became::Open,
        // It ran, and ended with its machine or its shim.
        (_, Journaled::Last(State::Released)) => Became::Arrived,
        // The source has what it lacked, and is in doubt until somebody decides.
        (_, Journaled::Damaged | Journaled::Last(State::Owing)) => Became::Unknowable,
        // Told to run at most, and gone before it did for more than a moment.
        _ => Became::Never,
    }
}

/// What the agent of the target has in its book.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kept {
    Open,
    Arrived,
    /// It runs here, and lacks pages that only the source has.
    Owed,
    Discarded,
}

/// What a target says that it is asked about a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Standing {
    /// It runs here, or has run here to its end.
    Arrived,
    /// It does not run here and never will.
    Discarded,
    /// It runs here, and what it lacks only the source has.
    Owed,
    /// Ask again.
    Undecided,
    /// No record, which proves nothing.
    Unknown,
}

/// The answer comes from a record, never from the absence of one.
pub fn standing(kept: Option<Kept>) -> Standing {
    match kept {
        Some(Kept::Arrived) => Standing::Arrived,
        Some(Kept::Owed) => Standing::Owed,
        Some(Kept::Discarded) => Standing::Discarded,
        Some(Kept::Open) => Standing::Undecided,
        None => Standing::Unknown,
    }
}

impl Standing {
    pub fn as_str(self) -> &'static str {
        match self {
            Standing::Arrived => "arrived",
            Standing::Discarded => "discarded",
            Standing::Owed => "owed",
            Standing::Undecided => "undecided",
            Standing::Unknown => "unknown",
        }
    }

    /// A word of a later version proves nothing.
    pub fn of(word: &str) -> Self {
        match word {
            "arrived" => Standing::Arrived,
            "discarded" => Standing::Discarded,
            "owed" => Standing::Owed,
            "undecided" => Standing::Undecided,
            _ => Standing::Unknown,
        }
    }
}

// --- the agent of the source -----------------------------------------------

/// Where the container is, proved by the target itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Proof {
    RunsThere,
    NeverThere,
}

/// What follows from the target's answer, if anything does.
pub fn on_standing(standing: Standing) -> Option<Proof> {
    match standing {
        Standing::Arrived => Some(Proof::RunsThere),
        Standing::Discarded => Some(Proof::NeverThere),
        Standing::Owed | Standing::Undecided | Standing::Unknown => None,
    }
}

/// How a migration goes on that a former run of the agent left open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resume {
    /// It was never given away.
    StayedHome,
    /// Only the target can tell.
    Ask,
}

/// `departing`: our shim was told to depart. `shim_lives`: it may still go on,
/// and its journal with it.
pub fn after_restart(departing: bool, shim_lives: bool, journaled: Journaled) -> Resume {
    match journaled {
        _ if !departing => Resume::StayedHome,
        // Its shim ended before it had promised anything, and its container
        // with it: nobody has to be asked, who may be gone for good.
        Journaled::Last(State::Offered | State::Aborted) if !shim_lives => Resume::StayedHome,
        _ => Resume::Ask,
    }
}

/// What came of telling our shim where its container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Told {
    Settled,
    /// It knows of no such departure: that ended before.
    NotUnderWay,
    /// The shim is dead, and its container with it.
    Gone,
    /// No answer, or it does not wait for one yet.
    Unclear,
}

/// Whether it must be told again. A shim in doubt learns of the proof from
/// nobody else, and an agent that has written down the ending does not come
/// back.
pub fn tell_again(told: Told) -> bool {
    told == Told::Unclear
}

// --- a person --------------------------------------------------------------

/// What somebody may decide about a container that is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// The source's copy runs on; the target's must never.
    RunHere,
    /// This side's copy ends.
    Discard,
}

impl Choice {
    pub fn as_str(self) -> &'static str {
        match self {
            Choice::RunHere => "run-here",
            Choice::Discard => "discard",
        }
    }

    pub fn of(word: &str) -> Option<Self> {
        [Choice::RunHere, Choice::Discard].into_iter().find(|choice| choice.as_str() == word)
    }
}

/// Whether a person is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Needed {
    /// The target has just proved where it is.
    No(Proof),
    /// The target answers, and will know: no risk has to be taken.
    NotYet,
    Yes,
}

/// `asked`: what the target has said right now, if it can be reached.
pub fn needs_person(asked: Option<Standing>) -> Needed {
    match asked {
        Some(Standing::Undecided) => Needed::NotYet,
        Some(Standing::Owed | Standing::Unknown) | None => Needed::Yes,
        Some(standing @ (Standing::Arrived | Standing::Discarded)) => {
            on_standing(standing).map_or(Needed::Yes, Needed::No)
        }
    }
}

/// The epoch of a person's decision: everything said before is void.
pub fn raised(epoch: Epoch) -> Epoch {
    Epoch(epoch.0.saturating_add(1))
}

/// What a target does that hears of a decision to run the source's copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Overrule {
    /// It knows of a later one.
    Stale,
    /// Its own copy ends, if there is one: first the record, then the act.
    Follow,
    /// It has followed it, or had nothing: only the answer is missing.
    Done,
}

/// `discarded`: by its book it has nothing any more.
pub fn on_decision(known: Epoch, decided: Epoch, discarded: bool) -> Overrule {
    if decided < known {
        Overrule::Stale
    } else if discarded {
        Overrule::Done
    } else {
        // Also once more: it may have died between the record and the act.
        Overrule::Follow
    }
}

/// What a source may do once its shim was told of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Obeyed {
    /// It is done, and the target must follow.
    Done,
    Wait,
    /// There is no frozen copy to decide about. A target that was overruled
    /// now might lose the only one.
    Withdraw,
}

/// `runs_here`: what the daemon shows of the copy. It matters if the shim knows
/// of no doubt: it may have obeyed when the agent died.
pub fn after_decision(choice: Choice, told: Told, runs_here: bool) -> Obeyed {
    match (choice, told) {
        (_, Told::Settled) | (Choice::Discard, Told::Gone) => Obeyed::Done,
        (_, Told::Unclear) => Obeyed::Wait,
        (Choice::RunHere, Told::NotUnderWay) if runs_here => Obeyed::Done,
        (Choice::Discard, Told::NotUnderWay) if !runs_here => Obeyed::Done,
        (_, Told::NotUnderWay) | (Choice::RunHere, Told::Gone) => Obeyed::Withdraw,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOURNALED: [Journaled; 7] = [
        Journaled::Absent,
        Journaled::Damaged,
        Journaled::Last(State::Offered),
        Journaled::Last(State::Prepared),
        Journaled::Last(State::Running),
        Journaled::Last(State::Released),
        Journaled::Last(State::Aborted),
    ];

    #[test]
    fn what_runs_is_kept_and_silence_proves_nothing() {
        for journaled in JOURNALED {
            assert_eq!(became(Seen::Runs, true, journaled, true), Became::Arrived);
            assert_eq!(became(Seen::Silent, true, journaled, true), Became::Open);
        }
    }

    #[test]
    fn what_is_gone_has_arrived_only_if_it_ran() {
        for journaled in JOURNALED {
            let expected = match journaled {
                Journaled::Last(State::Released) => Became::Arrived,
                Journaled::Damaged => Became::Unknowable,
                _ => Became::Never,
            };
            for leased in [true, false] {
                assert_eq!(became(Seen::Gone, leased, journaled, false), expected, "{journaled:?}");
            }
        }
    }

    #[test]
    fn what_was_undone_is_not_found_again_under_its_name() {
        let undone = Journaled::Last(State::Prepared);
        assert_eq!(became(Seen::Runs, false, undone, false), Became::Never);
        let kept = Journaled::Last(State::Running);
        assert_eq!(became(Seen::Runs, false, kept, false), Became::Arrived);
    }

    #[test]
    fn only_two_words_of_a_target_prove_anything() {
        for (word, proof) in [
            ("arrived", Some(Proof::RunsThere)),
            ("discarded", Some(Proof::NeverThere)),
            ("undecided", None),
            ("owed", None),
            ("unknown", None),
            ("of a later version", None),
        ] {
            assert_eq!(on_standing(Standing::of(word)), proof, "{word}");
        }
        for kept in
            [None, Some(Kept::Open), Some(Kept::Arrived), Some(Kept::Owed), Some(Kept::Discarded)]
        {
            let standing = standing(kept);
            assert_eq!(Standing::of(standing.as_str()), standing);
        }
    }

    #[test]
    fn a_restart_asks_unless_nothing_was_promised() {
        let offered = Journaled::Last(State::Offered);
        assert_eq!(after_restart(false, true, Journaled::Absent), Resume::StayedHome);
        assert_eq!(after_restart(true, false, offered), Resume::StayedHome);
        assert_eq!(after_restart(true, true, offered), Resume::Ask);
        for journaled in [Journaled::Absent, Journaled::Damaged, Journaled::Last(State::Committed)]
        {
            assert_eq!(after_restart(true, false, journaled), Resume::Ask, "{journaled:?}");
        }
    }

    #[test]
    fn a_decision_about_nothing_is_taken_back() {
        for runs_here in [true, false] {
            let obeyed = |choice| after_decision(choice, Told::NotUnderWay, runs_here);
            assert_eq!(obeyed(Choice::RunHere) == Obeyed::Done, runs_here);
            assert_eq!(obeyed(Choice::Discard) == Obeyed::Done, !runs_here);
        }
        assert_eq!(after_decision(Choice::RunHere, Told::Gone, false), Obeyed::Withdraw);
        assert_eq!(after_decision(Choice::RunHere, Told::Unclear, true), Obeyed::Wait);
    }

    #[test]
    fn a_target_follows_until_it_has_nothing() {
        let (first, second) = (Epoch(1), raised(Epoch(1)));
        assert_eq!(on_decision(first, second, false), Overrule::Follow);
        // It died between the record and the act.
        assert_eq!(on_decision(second, second, false), Overrule::Follow);
        assert_eq!(on_decision(second, second, true), Overrule::Done);
        assert_eq!(on_decision(second, first, false), Overrule::Stale);
    }
}
