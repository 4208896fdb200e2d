//! Who knows what.

use transship_migration::{
    decide::{Became, Choice, Journaled, Proof},
    journal::State,
};

/// Of one migration, from node to node.
pub const FIRST: u64 = 1;

/// One instance of the container. Each migration makes at most one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Instance {
    None,
    Runs,
    Frozen,
    /// Restored; has not run.
    Held,
    /// Ended by the hand-over, or by a person.
    Ended,
    /// Ended by a fault, while it was the container.
    Crashed,
}

/// The shim of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Giver {
    /// It has not been told to depart.
    Idle,
    Offers,
    Promised,
    InDoubt,
    /// The target runs it and lacks pages.
    Owes,
    StayedHome,
    Departed,
    Dead,
}

/// The shim of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Taker {
    Waits,
    Holds,
    /// It has read the commit and is about to let go.
    Releases,
    Runs,
    Refused,
    /// It could not discard, and says nothing.
    Stuck,
    Dead,
}

/// The book of the source's agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Book {
    Open { departing: bool },
    InDoubt,
    StayedHome,
    Departed,
    Discarded,
}

/// The book of the target's agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ToBook {
    Open,
    InDoubt,
    Arrived,
    Discarded,
}

/// Said once, a message may be heard never, late, and more than once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Message {
    Images,
    Prepared,
    Commit,
    Running,
    Refused,
    Abort,
    Filled,
    /// From agent to agent: the source has stayed home.
    Discard,
    Arrived,
    Discarded,
    Owed,
    Undecided,
    Unknown,
    Overruled,
    Fenced,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Move {
    pub from: usize,
    /// The copy that leaves.
    pub source: usize,
    pub giver: Giver,
    pub given: Journaled,
    pub book: Book,
    /// The agent hears what its shim says: not after a restart.
    pub listens: bool,
    /// Known to the agent, until it restarts.
    pub proof: Option<Proof>,
    pub decided: Option<Choice>,
    /// The target has followed the decision.
    pub fenced: bool,

    /// The copy that arrives.
    pub target: usize,
    pub taker: Taker,
    pub taken: Journaled,
    pub to_book: ToBook,
    pub leased: bool,
    /// Known to the agent, until it restarts.
    pub became: Option<Became>,
    pub epoch: u64,
    /// Pages that only the source has.
    pub owed: bool,
    /// `released` was on the disk.
    pub ran: bool,

    said: u16,
}

impl Move {
    pub fn new(from: usize, source: usize, target: usize) -> Self {
        Self {
            from,
            source,
            giver: Giver::Idle,
            given: Journaled::Absent,
            book: Book::Open { departing: false },
            listens: true,
            proof: None,
            decided: None,
            fenced: false,
            target,
            taker: Taker::Waits,
            taken: Journaled::Last(State::Offered),
            to_book: ToBook::Open,
            leased: true,
            became: None,
            epoch: FIRST,
            owed: false,
            ran: false,
            said: 0,
        }
    }

    pub fn to(&self) -> usize {
        1 - self.from
    }

    pub fn say(&mut self, message: Message) {
        self.said |= 1 << message as u8;
    }

    pub fn heard(&self, message: Message) -> bool {
        self.said & (1 << message as u8) != 0
    }

    /// Nobody will ask about it any more, on the source.
    pub fn has_ended(&self) -> bool {
        matches!(self.book, Book::StayedHome | Book::Departed | Book::Discarded)
    }

    pub fn has_ended_there(&self) -> bool {
        matches!(self.to_book, ToBook::Arrived | ToBook::Discarded)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct World {
    pub copies: [Instance; 3],
    /// The node of each.
    pub at: [usize; 3],
    pub moves: [Option<Move>; 2],
    /// The agents.
    pub up: [bool; 2],
    pub faults: u8,
    /// Decisions that people may still take.
    pub people: u8,
}

impl World {
    pub fn new(faults: u8, people: u8) -> Self {
        Self {
            copies: [Instance::Runs, Instance::None, Instance::None],
            at: [0; 3],
            moves: [None, None],
            up: [true; 2],
            faults,
            people,
        }
    }

    pub fn moves(&self) -> impl Iterator<Item = &Move> {
        self.moves.iter().flatten()
    }

    pub fn running(&self) -> usize {
        self.copies.iter().filter(|copy| **copy == Instance::Runs).count()
    }

    /// Somebody has decided that the source's copy runs on, and the target
    /// has not heard of it.
    pub fn at_a_persons_risk(&self) -> bool {
        self.moves().any(|one| one.decided == Some(Choice::RunHere) && !one.fenced)
    }
}
