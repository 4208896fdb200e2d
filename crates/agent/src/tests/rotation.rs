//! Certificates that are replaced while the agent runs.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use time::OffsetDateTime;
use transship_types::Code;

use super::world::{Side, World, end, ending};
use crate::{
    authority,
    book::{End, Ending},
    check::check,
    identity::NOTICE,
};

/// A new certificate of `side` in the place of the old one.
fn replace(world: &World, side: &Side, of: &str) {
    let fresh = world.dir.path().join("fresh");
    let _ = fs::remove_dir_all(&fresh);
    authority::issue(&world.dir.path().join("ca"), &of.parse().unwrap(), &fresh).unwrap();
    let given = &side.node.config.credentials;
    fs::copy(fresh.join("node.pem"), &given.certificate).unwrap();
    fs::copy(fresh.join("node.key"), &given.key).unwrap();
}

/// Tells `to` to refuse what was issued to `whose`.
fn revoke(world: &World, to: &Side, whose: &str) {
    let ca = world.dir.path().join("ca");
    authority::revoke(&ca, whose).unwrap();
    let list = to.node.config.credentials.ca.with_file_name("crl.pem");
    fs::copy(ca.join("crl.pem"), list).unwrap();
    to.node.renew().unwrap();
}

async fn complaints(side: &Side) -> Vec<String> {
    let results = check(&side.node, "").await;
    let about = results.into_iter().filter(|r| r.name == "certificate" && !r.remedy.is_empty());
    about.map(|r| format!("{} ({})", r.detail, r.remedy)).collect()
}

#[tokio::test]
async fn a_migration_that_runs_is_not_disturbed_by_new_certificates() {
    let world = World::new().await;
    world.a.fake.hold("pages");
    let live = world.begin().await.unwrap();
    world.a.fake.until("pages").await;
    for (side, name) in [(&world.a, "a"), (&world.b, "b")] {
        let before = side.node.trust().until();
        replace(&world, side, name);
        side.node.renew().unwrap();
        assert!(side.node.trust().until() >= before);
    }
    // Even if the old ones are not good any more.
    let old = world.dir.path().join("ca/issued.d");
    let names: Vec<_> = fs::read_dir(&old).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(names.len(), 4, "each twice");
    world.a.fake.release("pages");
    assert!(matches!(end(&live).await, End::Moved(_)));

    // And the next one, with the new ones.
    let mut request = world.request();
    request.node = format!("a@{}", world.a.address());
    let live = crate::source::begin(&world.b.node, &request).await.unwrap();
    assert!(matches!(end(&live).await, End::Moved(_)));
}

#[tokio::test]
async fn a_revoked_node_is_refused_from_then_on() {
    let world = World::new().await;
    revoke(&world, &world.b, "a");
    let (stayed, codes, _) = ending(&world.migrate().await);
    assert_eq!((stayed, codes), (Ending::StayedHome, vec![Code::NotTrusted]));
    assert_eq!(world.runs_on(), "a");

    // Until it has another certificate.
    replace(&world, &world.a, "a");
    world.a.node.renew().unwrap();
    assert!(matches!(world.migrate().await, End::Moved(_)));
}

/// Agent and shims go on with what was read before.
#[tokio::test]
async fn what_is_no_good_changes_nothing_and_is_said() {
    let world = World::new().await;
    let ca = world.dir.path().join("ca");
    let given = world.a.node.config.credentials.clone();
    let list = given.ca.with_file_name("crl.pem");
    authority::issue(&ca, &"c".parse().unwrap(), &world.dir.path().join("c")).unwrap();
    revoke(&world, &world.a, "c");
    let files = [&given.ca, &given.certificate, &given.key, &list];
    let good: Vec<_> = files.iter().map(|file| fs::read(file).unwrap()).collect();

    for broken in
        ["node.key", "half", "b, and this node is a", "has been revoked", "no rev", "gone"]
    {
        for (file, bytes) in files.iter().zip(&good) {
            fs::write(file, bytes).unwrap();
        }
        world.a.node.renew().unwrap();
        assert_eq!(complaints(&world.a).await, [""; 0], "before {broken}");
        let said = match broken {
            "node.key" => {
                fs::write(&given.key, "no key").unwrap();
                broken
            }
            // The certificate is here, its key is not yet.
            "half" => {
                replace(&world, &world.a, "a");
                fs::write(&given.key, &good[2]).unwrap();
                "node.key"
            }
            "b, and this node is a" => {
                replace(&world, &world.a, "b");
                broken
            }
            "has been revoked" => {
                authority::revoke(&ca, given.certificate.to_str().unwrap()).unwrap();
                fs::copy(ca.join("crl.pem"), &list).unwrap();
                broken
            }
            "no rev" => {
                fs::write(&list, "no list").unwrap();
                "holds no revocation list"
            }
            _ => {
                fs::remove_file(&list).unwrap();
                "is gone"
            }
        };
        let before = world.a.node.identities.current();
        let error = world.a.node.renew().unwrap_err();
        assert!(crate::failure::chain(&error).contains(said), "{broken}: {error}");
        assert!(std::sync::Arc::ptr_eq(&before, &world.a.node.identities.current()), "{broken}");
        let complaints = complaints(&world.a).await;
        assert!(complaints[0].contains(said) && complaints[0].contains("stays in use"));
    }
    assert!(matches!(world.migrate().await, End::Moved(_)), "the last one is still broken");
}

#[tokio::test]
async fn the_copies_for_the_shims_are_roots_alone_and_go_with_the_agent() {
    let mut world = World::new().await;
    for _ in 0..3 {
        world.a.node.renew().unwrap();
    }
    let files = world.a.node.identities.current().files.clone();
    let dir = files.key.parent().unwrap().to_owned();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&files.key), mode(&dir), mode(dir.parent().unwrap())), (0o600, 0o700, 0o700));
    let kept = fs::read_dir(dir.parent().unwrap()).unwrap().count();
    assert_eq!(kept, 2, "those in use, and those before them");
    world.a.close().await;
    assert!(!dir.exists());
}

/// One that is started beside another by mistake gives up at its sockets.
#[tokio::test]
async fn a_second_agent_takes_nothing_from_the_first() {
    let mut world = World::new().await;
    let copies = world.a.node.places.runtime.join("credentials");
    world.a.close().await;
    let first = copies.join("1/1");
    fs::create_dir_all(&first).unwrap();
    let given = &world.a.node.config.credentials;
    let second = crate::identity::Identities::open(given, &copies).unwrap();
    assert!(first.exists(), "it may be in use");
    second.sweep();
    assert!(!first.exists() && second.current().files.key.exists());
}

#[tokio::test]
async fn what_expires_soon_is_said_before() {
    let world = World::new().await;
    assert_eq!(complaints(&world.a).await, [""; 0]);
    let identity = world.a.node.identities.current();
    let until = identity.trust.until();
    let said = |now: OffsetDateTime| identity.warnings(now);
    assert!(said(until - NOTICE - time::Duration::HOUR).is_empty());
    let (warning, remedy) = said(until - NOTICE + time::Duration::HOUR).remove(0);
    assert!(warning.contains("certificate of a expires on"), "{warning}");
    assert!(warning.contains(&until.date().to_string()), "{warning}");
    assert!(remedy.contains("transshipd issue a"), "{remedy}");
}
