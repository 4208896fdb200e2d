//! Somebody changes their mind, in every phase.

use transship_types::Code;

use super::world::{World, end, ending, eventually};
use crate::book::Ending;

#[tokio::test]
async fn a_cancel_before_the_commit_undoes_everything() {
    for (point, side, released) in [
        ("describe", 'a', false),
        ("read", 'a', false),
        ("write", 'b', true),
        ("create", 'b', true),
        ("start", 'b', true),
        ("pages", 'a', false),
        ("restore", 'b', true),
        ("prepared", 'a', false),
    ] {
        let world = World::new().await;
        let held = if side == 'a' { &world.a } else { &world.b };
        held.fake.hold(point);
        let live = world.begin().await.unwrap();
        held.fake.until(point).await;
        live.cancel.cancel();
        // A daemon that is at work for us is waited for, a peer is not.
        if released {
            held.fake.release(point);
        }
        let (ending, codes, outcome) = ending(&end(&live).await);
        assert_eq!(
            (ending, codes.as_slice()),
            (Ending::StayedHome, &[Code::Cancelled][..]),
            "{point}"
        );
        assert!(outcome.contains("redis is RUNNING on a"), "{point}: {outcome}");
        held.fake.release(point);
        world.nothing_left().await;
        assert_eq!(world.runs_on(), "a", "{point}");
        // And it can still be moved.
        let again = world.migrate().await;
        assert_eq!(world.runs_on(), "b", "{point}: {again:?}");
    }
}

#[tokio::test]
async fn a_cancel_after_the_commit_is_too_late_and_says_so() {
    let world = World::new().await;
    world.a.fake.hold("committed");
    let live = world.begin().await.unwrap();
    world.a.fake.until("committed").await;
    live.cancel.cancel();
    let mut watch = live.watch();
    let view = watch.wait_for(|v| v.too_late.is_some()).await.unwrap();
    assert_eq!(view.too_late.as_deref(), Some("it is committed"));
    drop(view);
    world.a.fake.release("committed");
    assert_eq!(ending(&end(&live).await).0, Ending::Departed);
    eventually("it runs on b", || world.runs_on() == "b").await;
}
