//! What is promised, how far it was checked, and that the checker would see it.

use std::cell::Cell;

use stateright::{Checker, HasDiscoveries, Model, Property};
use transship_migration::{
    decide::{
        self, Became, Choice, Journaled, Kept, Obeyed, Overrule, Proof, Resume, Seen, Standing,
        Told,
    },
    handoff::{Answer, Ending},
};

use crate::{
    heal::heal,
    rules::Rules,
    steps::{Action, Event, after},
    world::{Book, Giver, Instance, Move, ToBook, World},
};

/// How far a search goes: everything that can happen with so many of each.
#[derive(Clone)]
struct Handover {
    rules: Rules,
    migrations: usize,
    faults: u8,
    people: u8,
    post_copy: bool,
}

impl Default for Handover {
    fn default() -> Self {
        Self { rules: Rules::default(), migrations: 1, faults: 2, people: 1, post_copy: false }
    }
}

/// `make test` shall not take long on the smallest machine.
const THREADS: usize = 2;

const NEVER_TWO: &str = "never two running";
const NEVER_NONE: &str = "never none while one could be saved";
const NO_DOUBT: &str = "in doubt always ends once both sides talk again";
const NOT_LACKING: &str = "nobody lacks pages that nobody has";
const NOT_BACK: &str = "what has run is not turned back";

impl Model for Handover {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.faults, self.people)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for node in 0..2 {
            if world.moves().count() < self.migrations {
                actions.push(Action::Begin(node));
            }
            actions.push(Action::AgentStarts(node));
            if world.faults > 0 {
                actions.extend([Action::AgentCrashes(node), Action::NodeCrashes(node)]);
            }
        }
        for number in 0..world.moves().count() {
            actions.extend(Event::NORMAL.map(|event| Action::To(number, event)));
            if world.faults > 0 {
                actions.extend(Event::FAULTS.map(|event| Action::To(number, event)));
            }
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        after(&self.rules, self.post_copy, world, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(NEVER_TWO, |model: &Self, world: &World| {
                world.running() <= 1
                    || world.at_a_persons_risk() && model.healed(world).running() <= 1
            }),
            Property::always(NEVER_NONE, |model, world| {
                let healed = model.healed(world);
                let crashed = healed.copies.contains(&Instance::Crashed);
                let given_up = |one: &Move| one.decided == Some(Choice::Discard);
                let frozen = healed.moves().any(needs_a_person);
                healed.running() == 1 || crashed || frozen || healed.moves().any(given_up)
            }),
            Property::always(NO_DOUBT, |model, world| {
                model.healed(world).moves().all(|one| is_over(one) || needs_a_person(one))
            }),
            Property::always(NOT_BACK, |_, world: &World| {
                world.moves().all(|one| {
                    let back = one.ran && world.copies[one.source] == Instance::Runs;
                    !back || one.decided == Some(Choice::RunHere)
                })
            }),
            Property::always(NOT_LACKING, |_, world: &World| {
                world.moves().all(|one| {
                    let lacks = one.owed && world.copies[one.target] == Instance::Runs;
                    !lacks || one.decided.is_some() || world.copies[one.source] != Instance::Ended
                })
            }),
            Property::sometimes("it moves", |_, world: &World| {
                world.moves().any(|one| one.book == Book::Departed)
            }),
            Property::sometimes("a refusal after the commit", |_, world: &World| {
                let one = world.moves().next();
                one.is_some_and(|one| {
                    one.giver == Giver::StayedHome && one.heard(crate::world::Message::Commit)
                })
            }),
            Property::sometimes("a doubt ends by proof", |_, world: &World| {
                world.moves().any(|one| !one.listens && one.book == Book::Departed)
            }),
            Property::sometimes("a person decides, and both ran", |_, world: &World| {
                world.moves().any(|one| one.fenced && one.ran)
            }),
        ]
    }
}

impl Handover {
    /// Asked for by several promises, one after the other.
    fn healed(&self, world: &World) -> World {
        thread_local! {
            static LAST: Cell<Option<(usize, World, World)>> = const { Cell::new(None) };
        }
        let model = std::ptr::from_ref(self).addr();
        match LAST.get() {
            Some((of, asked, healed)) if of == model && asked == *world => healed,
            _ => {
                let healed = heal(&self.rules, self.post_copy, world);
                LAST.set(Some((model, *world, healed)));
                healed
            }
        }
    }

    fn breaks(self, promise: &'static str) -> bool {
        let first = HasDiscoveries::AnyOf([promise].into());
        let checker = self.checker().finish_when(first).threads(THREADS).spawn_bfs().join();
        checker.discovery(promise).is_some()
    }
}

fn is_over(one: &Move) -> bool {
    use Giver as G;
    let open = matches!(one.giver, G::Offers | G::Promised | G::InDoubt | G::Owes);
    one.has_ended() && one.has_ended_there() && !open
}

/// There is no proof to be had: a journal is damaged whose container is gone,
/// or pages are owed and one side of them is lost.
fn needs_a_person(one: &Move) -> bool {
    one.to_book == ToBook::InDoubt || one.owed
}

fn holds(model: Handover) {
    let checker = model.checker().threads(THREADS).spawn_bfs().join();
    println!("{} states, {} deep", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
}

/// One migration, three faults, and a person who decides twice.
#[test]
fn one_migration() {
    holds(Handover { faults: 3, people: 2, ..Handover::default() });
}

/// The same, and what runs on the target lacks pages for a while.
#[test]
fn one_migration_with_post_copy() {
    holds(Handover { faults: 3, people: 2, post_copy: true, ..Handover::default() });
}

/// Twice there, or there and back, also before the first has come to its end.
#[test]
fn two_migrations() {
    holds(Handover { migrations: 2, ..Handover::default() });
}

/// A checker that finds nothing has to show that it could: each of these is
/// one wrong decision, and breaks a promise.
#[test]
fn every_wrong_decision_is_found() {
    let right = Rules::default;
    let alone = Handover::default;
    let wrong = |rules: Rules| Handover { rules, ..alone() };
    let post_copy = |rules: Rules| Handover { rules, post_copy: true, ..alone() };
    let silence = |answer: &Answer| match answer {
        Answer::Silence => Ending::StayedHome,
        other => decide::after_answer(other),
    };
    let absence = |kept: Option<Kept>| match kept {
        Some(Kept::Open) => Standing::Discarded,
        other => decide::standing(other),
    };
    let unknown = |standing: Standing| match standing {
        Standing::Unknown => Some(Proof::NeverThere),
        other => decide::on_standing(other),
    };
    let owed = |kept: Option<Kept>| match kept {
        Some(Kept::Owed) => Standing::Arrived,
        other => decide::standing(other),
    };
    let gone = |seen: Seen, leased: bool, journaled: Journaled, late: bool| match seen {
        Seen::Gone => Became::Never,
        other => decide::became(other, leased, journaled, late),
    };
    let guessed = |seen: Seen, leased: bool, journaled: Journaled, late: bool| match journaled {
        Journaled::Damaged => decide::became(seen, leased, Journaled::Absent, late),
        other => decide::became(seen, leased, other, late),
    };
    let restarted = |_: bool, _: bool, _: Journaled| Resume::StayedHome;
    let once = |known, decided, discarded| match decide::on_decision(known, decided, discarded) {
        Overrule::Follow if known == decided => Overrule::Stale,
        other => other,
    };
    let insists = |choice: Choice, told: Told, runs_here: bool| match told {
        Told::Unclear => decide::after_decision(choice, told, runs_here),
        _ => Obeyed::Done,
    };
    let forgets = |choice: Choice, told: Told, runs_here: bool| match told {
        Told::NotUnderWay => Obeyed::Withdraw,
        _ => decide::after_decision(choice, told, runs_here),
    };
    let cases = [
        (
            "the commit before the journal",
            NEVER_TWO,
            wrong(Rules { journal_before_commit: false, ..right() }),
        ),
        (
            "it runs before the journal",
            NEVER_TWO,
            wrong(Rules { journal_before_run: false, ..right() }),
        ),
        ("thawed on silence", NEVER_TWO, wrong(Rules { after_answer: silence, ..right() })),
        ("let go on silence", NEVER_TWO, wrong(Rules { may_run: |_, _| true, ..right() })),
        ("refused before it is gone", NEVER_TWO, wrong(Rules { may_refuse: |_| true, ..right() })),
        ("an open record is a discard", NEVER_TWO, wrong(Rules { standing: absence, ..right() })),
        ("no record is a discard", NEVER_TWO, wrong(Rules { on_standing: unknown, ..right() })),
        ("what is gone never ran", NOT_BACK, wrong(Rules { became: gone, ..right() })),
        ("a damaged journal is none", NOT_BACK, wrong(Rules { became: guessed, ..right() })),
        ("a restart is a stay", NO_DOUBT, wrong(Rules { after_restart: restarted, ..right() })),
        ("the shim is told once", NO_DOUBT, wrong(Rules { tell_again: |_| false, ..right() })),
        (
            "nothing beyond the leases",
            NO_DOUBT,
            wrong(Rules { look_beyond_leases: false, ..right() }),
        ),
        (
            "a decision is not heard",
            NEVER_TWO,
            wrong(Rules { on_decision: |_, _, _| Overrule::Stale, ..right() }),
        ),
        ("a decision is followed once", NEVER_TWO, wrong(Rules { on_decision: once, ..right() })),
        ("a decision is forgotten", NEVER_TWO, wrong(Rules { after_decision: forgets, ..right() })),
        (
            "a decision about nothing",
            NEVER_NONE,
            wrong(Rules { after_decision: insists, ..right() }),
        ),
        (
            "owed pages are left behind",
            NOT_LACKING,
            post_copy(Rules { after_running: |_| Some(Ending::Departed), ..right() }),
        ),
        ("owed is arrived", NOT_LACKING, post_copy(Rules { standing: owed, ..right() })),
        (
            "two at a time",
            NEVER_TWO,
            Handover { migrations: 2, ..wrong(Rules { one_at_a_time: false, ..right() }) },
        ),
    ];
    for (case, promise, model) in cases {
        assert!(model.breaks(promise), "{case} does not break: {promise}");
    }
}
