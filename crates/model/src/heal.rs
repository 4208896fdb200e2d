//! What the world comes to by itself: no fault any more, both agents run, and
//! every message is heard.

use transship_migration::decide::Standing;

use crate::{
    rules::Rules,
    steps::{Action, Event, after},
    world::World,
};

/// First what makes the hand-over go on, then what gives it up.
const ORDER: [Event; 25] = [
    Event::Obeys,
    Event::HearsDecision,
    Event::FollowsDecision,
    Event::HearsFenced,
    Event::HearsRunning,
    Event::HearsRefused,
    Event::HearsCommit,
    Event::LetsGo,
    Event::NotesThatItRuns,
    Event::Resumes,
    Event::Fills,
    Event::HearsFilled,
    Event::StaysHome,
    Event::LosesSource,
    Event::HearsNothing,
    Event::GivesUp,
    Event::SeesEnding,
    Event::LooksBack,
    Event::HearsDiscard,
    Event::Looks,
    Event::WritesDown,
    Event::Asks,
    Event::HearsStanding(Standing::Arrived),
    Event::HearsStanding(Standing::Discarded),
    Event::TellsShim,
];

/// Far more than any migration has steps.
const LIMIT: usize = 200;

pub fn heal(rules: &Rules, post_copy: bool, world: &World) -> World {
    let mut world = *world;
    world.up = [true; 2];
    for _ in 0..LIMIT {
        let moves = 0..world.moves().count();
        let actions = ORDER
            .iter()
            .flat_map(|event| moves.clone().map(move |number| Action::To(number, *event)));
        let mut next = actions.filter_map(|action| after(rules, post_copy, &world, action));
        match next.next() {
            Some(next) => world = next,
            None => return world,
        }
    }
    panic!("it does not come to rest: {world:#?}");
}
