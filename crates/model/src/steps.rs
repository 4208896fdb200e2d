//! What can happen next, and what it changes.

use transship_migration::{
    decide::{
        self, Became, Choice, Journaled, Kept, Obeyed, Overrule, Proof, Resume, Seen, Standing,
        Told, Word,
    },
    handoff::{Answer, Ending},
    journal::State,
};
use transship_types::Epoch;

use crate::{
    rules::Rules,
    world::{Book, FIRST, Giver, Instance, Message, Move, Taker, ToBook, World},
};

/// To a migration, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    // The source's shim.
    Starts,
    Freezes,
    Commits,
    StaysHome,
    HearsRunning,
    HearsRefused,
    HearsNothing,
    /// It dials again: the target runs and lacks pages.
    Resumes,
    HearsFilled,
    // The target's shim.
    Restores,
    HearsCommit,
    LetsGo,
    CannotLetGo,
    NotesThatItRuns,
    Fills,
    LosesSource,
    // The source's agent.
    Departs,
    GivesUp,
    SeesEnding,
    LooksBack,
    Asks,
    HearsStanding(Standing),
    TellsShim,
    Decides(Choice),
    Obeys,
    HearsFenced,
    // The target's agent.
    HearsDiscard,
    Looks,
    WritesDown,
    HearsDecision,
    FollowsDecision,
    // Faults.
    FullAtCommit,
    FullAtRun,
    CannotDiscard,
    GiverCrashes,
    TakerCrashes,
    GiverHangs,
    ForgetsBook,
    DamagesGiven,
    DamagesTaken,
}

impl Event {
    /// By themselves, or because somebody wants it.
    pub const NORMAL: [Event; 35] = [
        Event::Starts,
        Event::Freezes,
        Event::Commits,
        Event::StaysHome,
        Event::HearsRunning,
        Event::HearsRefused,
        Event::HearsNothing,
        Event::Resumes,
        Event::HearsFilled,
        Event::Restores,
        Event::HearsCommit,
        Event::LetsGo,
        Event::CannotLetGo,
        Event::NotesThatItRuns,
        Event::Fills,
        Event::LosesSource,
        Event::Departs,
        Event::GivesUp,
        Event::SeesEnding,
        Event::LooksBack,
        Event::Asks,
        Event::HearsStanding(Standing::Arrived),
        Event::HearsStanding(Standing::Discarded),
        Event::HearsStanding(Standing::Owed),
        Event::HearsStanding(Standing::Unknown),
        Event::TellsShim,
        Event::Decides(Choice::RunHere),
        Event::Decides(Choice::Discard),
        Event::Obeys,
        Event::HearsFenced,
        Event::HearsDiscard,
        Event::Looks,
        Event::WritesDown,
        Event::HearsDecision,
        Event::FollowsDecision,
    ];

    pub const FAULTS: [Event; 9] = [
        Event::FullAtCommit,
        Event::FullAtRun,
        Event::CannotDiscard,
        Event::GiverCrashes,
        Event::TakerCrashes,
        Event::GiverHangs,
        Event::ForgetsBook,
        Event::DamagesGiven,
        Event::DamagesTaken,
    ];

    fn is_fault(self) -> bool {
        use Event as E;
        matches!(
            self,
            E::FullAtCommit
                | E::FullAtRun
                | E::CannotDiscard
                | E::GiverCrashes
                | E::TakerCrashes
                | E::GiverHangs
                | E::ForgetsBook
                | E::DamagesGiven
                | E::DamagesTaken
        )
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// A migration away from this node.
    Begin(usize),
    To(usize, Event),
    AgentCrashes(usize),
    AgentStarts(usize),
    NodeCrashes(usize),
}

/// `None`: it cannot happen, or changes nothing.
pub fn after(rules: &Rules, post_copy: bool, world: &World, action: Action) -> Option<World> {
    let mut next = *world;
    match action {
        Action::Begin(from) => begin(rules, &mut next, from)?,
        Action::To(number, event) => {
            if event.is_fault() {
                next.faults = next.faults.checked_sub(1)?;
            }
            let mut one = next.moves[number]?;
            happens(rules, post_copy, &mut next, &mut one, event)?;
            next.moves[number] = Some(one);
        }
        Action::AgentCrashes(node) => {
            next.faults = next.faults.checked_sub(1)?;
            agent_crashes(&mut next, node);
        }
        Action::AgentStarts(node) => next.up[node] = true,
        Action::NodeCrashes(node) => {
            next.faults = next.faults.checked_sub(1)?;
            agent_crashes(&mut next, node);
            node_crashes(&mut next, node);
        }
    }
    (next != *world).then_some(next)
}

fn begin(rules: &Rules, world: &mut World, from: usize) -> Option<()> {
    let to = 1 - from;
    let runs = |copy: &usize| world.at[*copy] == from && world.copies[*copy] == Instance::Runs;
    let source = (0..world.copies.len()).find(runs)?;
    if !(world.up[from] && world.up[to]) {
        return None;
    }
    if rules.one_at_a_time {
        // The book of either node has one open, or the name is in use there.
        let open = world.moves().any(|one| !(one.has_ended() && one.has_ended_there()));
        let is_there = |copy| matches!(copy, Instance::Runs | Instance::Frozen | Instance::Held);
        let taken = (0..world.copies.len()).any(|n| world.at[n] == to && is_there(world.copies[n]));
        if open || taken {
            return None;
        }
    }
    let number = world.moves().count();
    let target = number + 1;
    world.at[target] = to;
    world.moves[number] = Some(Move::new(from, source, target));
    Some(())
}

fn happens(
    rules: &Rules,
    post_copy: bool,
    world: &mut World,
    one: &mut Move,
    event: Event,
) -> Option<()> {
    use Event as E;
    let (here, there) = (world.up[one.from], world.up[one.to()]);
    let given = one.source;
    let taken = one.target;
    let require = |holds: bool| holds.then_some(());
    match event {
        // --- the source's shim
        E::Starts => {
            require(here && one.listens && one.giver == Giver::Idle)?;
            require(one.book == Book::Open { departing: true })?;
            one.giver = Giver::Offers;
            one.given = Journaled::Last(State::Offered);
        }
        E::Freezes => {
            require(one.giver == Giver::Offers && world.copies[given] == Instance::Runs)?;
            world.copies[given] = Instance::Frozen;
            one.say(Message::Images);
        }
        E::Commits => {
            require(one.heard(Message::Prepared) && one.giver == Giver::Offers)?;
            if rules.journal_before_commit {
                one.given = Journaled::Last(State::Committed);
            }
            one.giver = Giver::Promised;
            one.say(Message::Commit);
        }
        E::FullAtCommit => {
            require(one.heard(Message::Prepared) && one.giver == Giver::Offers)?;
            if !rules.journal_before_commit {
                one.say(Message::Commit);
            }
            // It may be on the disk all the same.
            one.given = Journaled::Last(State::Committed);
            ends(world, one, Ending::StayedHome);
        }
        E::StaysHome => {
            require(one.giver == Giver::Offers)?;
            ends(world, one, Ending::StayedHome);
            one.given = Journaled::Absent;
        }
        E::HearsRunning => {
            require(one.heard(Message::Running) && one.giver == Giver::Promised)?;
            match (rules.after_running)(one.owed) {
                Some(_) => answered(rules, world, one, &Answer::Accepted),
                None => one.giver = Giver::Owes,
            }
        }
        E::HearsRefused => {
            require(one.heard(Message::Refused) && one.giver == Giver::Promised)?;
            answered(rules, world, one, &Answer::Refused);
        }
        E::HearsNothing => {
            require(one.giver == Giver::Promised)?;
            answered(rules, world, one, &Answer::Silence);
        }
        E::Resumes => {
            require(one.giver == Giver::InDoubt && one.owed && one.taker == Taker::Runs)?;
            require(one.decided.is_none())?;
            one.giver = Giver::Owes;
        }
        E::HearsFilled => {
            require(one.heard(Message::Filled) && one.giver == Giver::Owes)?;
            answered(rules, world, one, &Answer::Accepted);
        }

        // --- the target's shim
        E::Restores => {
            require(one.heard(Message::Images) && one.taker == Taker::Waits)?;
            one.taker = Taker::Holds;
            world.copies[taken] = Instance::Held;
            one.taken = Journaled::Last(State::Prepared);
            one.say(Message::Prepared);
        }
        E::HearsCommit => {
            require(one.heard(Message::Commit) && one.taker == Taker::Holds)?;
            require((rules.may_run)(Epoch(FIRST), Word::Commit(Epoch(FIRST))))?;
            if rules.journal_before_run {
                one.taken = Journaled::Last(State::Running);
            }
            one.taker = Taker::Releases;
        }
        E::FullAtRun => {
            require(one.heard(Message::Commit) && one.taker == Taker::Holds)?;
            // It may be on the disk all the same.
            one.taken = Journaled::Last(State::Running);
            refuses(rules, world, one, true);
        }
        E::LetsGo => {
            require(one.taker == Taker::Releases)?;
            one.taker = Taker::Runs;
            world.copies[taken] = Instance::Runs;
            one.owed = post_copy;
            one.say(Message::Running);
        }
        E::CannotLetGo => {
            require(one.taker == Taker::Releases)?;
            refuses(rules, world, one, true);
            one.taken = Journaled::Absent;
        }
        E::CannotDiscard => {
            require(one.taker == Taker::Releases)?;
            // It may even run.
            world.copies[taken] = Instance::Runs;
            refuses(rules, world, one, false);
        }
        E::NotesThatItRuns => {
            let noted = [State::Released, State::Departed].map(Journaled::Last);
            require(one.taker == Taker::Runs && !noted.contains(&one.taken))?;
            require(matches!(one.taken, Journaled::Last(_)))?;
            one.taken = Journaled::Last(State::Released);
            one.ran = true;
        }
        E::Fills => {
            require(one.taker == Taker::Runs && one.owed && one.giver == Giver::Owes)?;
            one.owed = false;
            one.say(Message::Filled);
        }
        E::LosesSource => {
            require(matches!(one.taker, Taker::Waits | Taker::Holds))?;
            if one.taker == Taker::Holds && (rules.may_run)(Epoch(FIRST), Word::Other) {
                one.taken = Journaled::Last(State::Running);
                one.taker = Taker::Releases;
            } else {
                refuses(rules, world, one, true);
                one.taken = Journaled::Absent;
            }
        }

        // --- the source's agent
        E::Departs => {
            require(here && one.listens && one.book == Book::Open { departing: false })?;
            one.book = Book::Open { departing: true };
        }
        E::GivesUp => {
            require(here && one.listens && one.giver == Giver::Idle)?;
            require(matches!(one.book, Book::Open { .. }))?;
            one.book = Book::StayedHome;
            one.say(Message::Discard);
        }
        E::SeesEnding => {
            require(here && one.listens && matches!(one.book, Book::Open { .. }))?;
            match one.giver {
                Giver::StayedHome => {
                    one.book = Book::StayedHome;
                    one.say(Message::Discard);
                }
                Giver::Departed => one.book = Book::Departed,
                Giver::InDoubt | Giver::Dead => one.book = Book::InDoubt,
                _ => return None,
            }
        }
        E::LooksBack => {
            let Book::Open { departing } = one.book else { return None };
            require(here && !one.listens)?;
            let shim_lives = one.giver != Giver::Dead;
            one.book = match (rules.after_restart)(departing, shim_lives, one.given) {
                Resume::StayedHome => Book::StayedHome,
                Resume::Ask => Book::InDoubt,
            };
        }
        E::Asks => {
            require(here && there && asks(one))?;
            let kept = match one.to_book {
                ToBook::Open | ToBook::InDoubt => Kept::Open,
                ToBook::Arrived if one.owed => Kept::Owed,
                ToBook::Arrived => Kept::Arrived,
                ToBook::Discarded => Kept::Discarded,
            };
            one.say(message((rules.standing)(Some(kept))));
        }
        E::ForgetsBook => {
            require(here && there && asks(one))?;
            one.say(message((rules.standing)(None)));
        }
        E::HearsStanding(standing) => {
            require(here && asks(one) && one.heard(message(standing)))?;
            one.proof = Some((rules.on_standing)(standing)?);
        }
        E::TellsShim | E::GiverHangs => {
            let proof = one.proof?;
            require(here && one.book == Book::InDoubt)?;
            let hangs = event == E::GiverHangs;
            let ending = match proof {
                Proof::RunsThere => Ending::Departed,
                Proof::NeverThere => Ending::StayedHome,
            };
            let told = if hangs { Told::Unclear } else { told(one) };
            if told == Told::Settled {
                ends(world, one, ending);
                one.given = Journaled::Absent;
            }
            require(!(rules.tell_again)(told))?;
            one.proof = None;
            one.book = match proof {
                Proof::RunsThere => Book::Departed,
                Proof::NeverThere => Book::StayedHome,
            };
        }
        E::Decides(choice) => {
            require(here && asks(one) && world.people > 0)?;
            world.people -= 1;
            one.decided = Some(choice);
        }
        E::Obeys => {
            let choice = one.decided?;
            require(here && one.book == Book::InDoubt)?;
            let told = told(one);
            let runs_here = world.copies[given] == Instance::Runs;
            let (ending, book) = match choice {
                Choice::RunHere => (Ending::StayedHome, Book::StayedHome),
                Choice::Discard => (Ending::Departed, Book::Discarded),
            };
            match (rules.after_decision)(choice, told, runs_here) {
                Obeyed::Wait => return None,
                Obeyed::Withdraw => one.decided = None,
                // The agent may die before it has written that down.
                Obeyed::Done if told == Told::Settled => {
                    ends(world, one, ending);
                    one.given = Journaled::Absent;
                }
                Obeyed::Done => {
                    one.book = book;
                    if choice == Choice::RunHere {
                        one.say(Message::Overruled);
                    }
                }
            }
        }
        E::HearsFenced => {
            require(here && one.heard(Message::Fenced))?;
            one.fenced = true;
        }

        // --- the target's agent
        E::HearsDiscard => {
            require(there && one.heard(Message::Discard) && one.to_book == ToBook::Open)?;
            require(one.leased && world.copies[taken] != Instance::Runs)?;
            undo(world, one);
            one.became = Some(Became::Never);
        }
        E::Looks => {
            require(there && one.became.is_none() && one.to_book == ToBook::Open)?;
            require(one.leased || rules.look_beyond_leases)?;
            let late = one.taker == Taker::Stuck;
            let seen = seen(world, one);
            match (rules.became)(seen, one.leased, one.taken, late) {
                Became::Open => return None,
                Became::Unknowable => one.to_book = ToBook::InDoubt,
                Became::Never => {
                    undo(world, one);
                    one.became = Some(Became::Never);
                }
                Became::Arrived => {
                    one.leased = false;
                    one.became = Some(Became::Arrived);
                }
            }
        }
        E::WritesDown => {
            let became = one.became.take()?;
            require(there && one.to_book == ToBook::Open)?;
            let arrived = became == Became::Arrived;
            one.to_book = if arrived { ToBook::Arrived } else { ToBook::Discarded };
            one.taken = Journaled::Absent;
        }
        E::HearsDecision => {
            require(there && one.heard(Message::Overruled))?;
            let decided = decide::raised(Epoch(FIRST));
            match (rules.on_decision)(Epoch(one.epoch), decided, one.to_book == ToBook::Discarded) {
                Overrule::Stale => return None,
                Overrule::Done => one.say(Message::Fenced),
                Overrule::Follow => {}
            }
            one.epoch = decided.0;
        }
        E::FollowsDecision => {
            require(there && one.heard(Message::Overruled) && one.epoch > FIRST)?;
            require(one.to_book != ToBook::Discarded)?;
            let decided = decide::raised(Epoch(FIRST));
            let follow = (rules.on_decision)(Epoch(one.epoch), decided, false);
            require(follow == Overrule::Follow)?;
            if world.copies[taken] == Instance::Runs {
                world.copies[taken] = Instance::Ended;
            }
            undo(world, one);
            one.owed = false;
            one.became = None;
            one.taken = Journaled::Absent;
            one.to_book = ToBook::Discarded;
        }

        // --- faults
        E::GiverCrashes => {
            use Giver as G;
            require(matches!(one.giver, G::Offers | G::Promised | G::InDoubt | G::Owes))?;
            one.giver = Giver::Dead;
            crash(&mut world.copies[given]);
        }
        E::TakerCrashes => {
            require(!matches!(one.taker, Taker::Refused | Taker::Dead))?;
            one.taker = Taker::Dead;
            crash(&mut world.copies[taken]);
        }
        E::DamagesGiven => {
            require(matches!(one.given, Journaled::Last(_)) && !here)?;
            one.given = Journaled::Damaged;
        }
        E::DamagesTaken => {
            require(matches!(one.taken, Journaled::Last(_)) && !there)?;
            one.taken = Journaled::Damaged;
        }
    }
    Some(())
}

/// In doubt, without proof, and without a person who has decided.
fn asks(one: &Move) -> bool {
    one.book == Book::InDoubt && one.proof.is_none() && one.decided.is_none()
}

fn message(standing: Standing) -> Message {
    match standing {
        Standing::Arrived => Message::Arrived,
        Standing::Discarded => Message::Discarded,
        Standing::Owed => Message::Owed,
        Standing::Undecided => Message::Undecided,
        Standing::Unknown => Message::Unknown,
    }
}

fn answered(rules: &Rules, world: &mut World, one: &mut Move, answer: &Answer) {
    let ending = (rules.after_answer)(answer);
    ends(world, one, ending);
    if ending != Ending::InDoubt {
        one.given = Journaled::Absent;
    }
}

/// The source's shim comes to an ending.
fn ends(world: &mut World, one: &mut Move, ending: Ending) {
    let copy = &mut world.copies[one.source];
    match ending {
        Ending::Departed => {
            *copy = Instance::Ended;
            one.giver = Giver::Departed;
        }
        Ending::StayedHome => {
            *copy = Instance::Runs;
            one.giver = Giver::StayedHome;
            one.say(Message::Abort);
        }
        Ending::InDoubt => one.giver = Giver::InDoubt,
    }
}

/// The target's shim discards, and says so if it may.
fn refuses(rules: &Rules, world: &mut World, one: &mut Move, discarded: bool) {
    one.taker = if discarded { Taker::Refused } else { Taker::Stuck };
    if discarded {
        end_held(&mut world.copies[one.target]);
    }
    if (rules.may_refuse)(discarded) {
        one.say(Message::Refused);
    }
}

fn end_held(copy: &mut Instance) {
    if matches!(copy, Instance::Held | Instance::None) {
        *copy = Instance::Ended;
    }
}

/// The target's agent removes what was made, which does not run.
fn undo(world: &mut World, one: &mut Move) {
    end_held(&mut world.copies[one.target]);
    one.leased = false;
    if one.taker != Taker::Dead {
        one.taker = Taker::Refused;
    }
}

/// What the source's shim has to say to a settlement.
fn told(one: &Move) -> Told {
    match one.giver {
        Giver::InDoubt | Giver::Owes => Told::Settled,
        Giver::Offers | Giver::Promised => Told::Unclear,
        Giver::Idle | Giver::StayedHome | Giver::Departed => Told::NotUnderWay,
        Giver::Dead => Told::Gone,
    }
}

/// What the target's daemon shows.
fn seen(world: &World, one: &Move) -> Seen {
    match (one.taker, world.copies[one.target]) {
        (Taker::Runs | Taker::Stuck, Instance::Runs | Instance::Frozen) => Seen::Runs,
        (Taker::Waits | Taker::Holds | Taker::Releases | Taker::Stuck, _) => Seen::Unborn,
        (Taker::Runs, _) => Seen::Ended { had_process: true },
        (Taker::Refused, _) => Seen::Ended { had_process: false },
        (Taker::Dead, _) => Seen::Gone,
    }
}

fn agent_crashes(world: &mut World, node: usize) {
    world.up[node] = false;
    for one in world.moves.iter_mut().flatten() {
        if one.from == node {
            one.listens = false;
            one.proof = None;
        } else {
            one.became = None;
        }
    }
}

fn node_crashes(world: &mut World, node: usize) {
    for one in world.moves.iter_mut().flatten() {
        let ended = matches!(one.giver, Giver::StayedHome | Giver::Departed);
        if one.from == node && !ended {
            one.giver = Giver::Dead;
        }
        if one.to() == node && one.taker != Taker::Refused {
            one.taker = Taker::Dead;
        }
    }
    for copy in 0..world.copies.len() {
        if world.at[copy] == node {
            crash(&mut world.copies[copy]);
        }
    }
}

fn crash(copy: &mut Instance) {
    match copy {
        Instance::Runs | Instance::Frozen => *copy = Instance::Crashed,
        // It has not run: nothing is lost with it.
        Instance::Held => *copy = Instance::Ended,
        Instance::None | Instance::Ended | Instance::Crashed => {}
    }
}
