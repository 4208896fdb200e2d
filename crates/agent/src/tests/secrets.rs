//! What no log, no error and no record shows, at any level: a container's
//! environment, its annotations, its memory, and the ticket it travels under.

use std::{
    fs,
    io::{self, Write},
    path::Path,
    sync::{Arc, Mutex},
};

use tracing::{debug, trace};
use tracing_subscriber::util::SubscriberInitExt;
use transship_api::{
    control::{ListRequest, StatusRequest},
    control_ttrpc::AgentClient,
    session::{Any, Offer},
};
use ttrpc::{asynchronous::Client, context};

use super::{
    fake::PAGES,
    world::{IMAGE, Side, World, end, ending},
};
use crate::{logging, offer, source};

const SPEC: &str = r#"{
    "process": {"env": ["TOKEN=canary-of-the-environment"]},
    "annotations": {"note": "canary-of-an-annotation"},
    "linux": {"namespaces": [{"type": "network"}]}
}"#;
const CANARY: &str = "canary-of";

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Everything that is said and written down while containers move, stay, are
/// refused and get lost on the way.
#[tokio::test]
async fn no_log_and_no_error_shows_what_is_in_a_container() {
    assert!(PAGES.starts_with(CANARY.as_bytes()));
    let log = Log::default();
    let writer = log.clone();
    // One thread runs every task of this test, so this hears them all.
    let _heard = logging::to(move || writer.clone(), false, Some("trace")).set_default();
    trace!("at its most talkative");
    let mut said = String::new();
    let mut tickets = Vec::new();
    for fate in ["moves", "lease", "create", "start", "restore", "running", "cut", "refused"] {
        let world = World::new().await;
        world.a.fake.run(&world.key, IMAGE, SPEC);
        match fate {
            "moves" => {}
            "refused" => world.b.fake.run(&world.key, IMAGE, SPEC),
            "cut" => world.a.fake.hold("prepared"),
            point => drop(world.b.fake.state().fail.insert(point, "no luck")),
        }
        let live = world.begin().await.unwrap();
        if fate == "cut" {
            world.a.fake.until("prepared").await;
            world.cable.cut();
            world.a.fake.release("prepared");
        }
        let ended = end(&live).await;
        said += &format!("{fate}: {:?} {ended:?}\n", ending(&ended));
        tickets.extend(world.b.fake.state().tickets.values().cloned());
        for side in [&world.a, &world.b] {
            said += &format!("{:?} {:?}\n", side.node.book.records(), side.node.config);
            written(&side.node.places.state, &mut said);
            said += &told(side).await;
        }
    }
    said += &malformed();
    let world = World::new().await;
    let c = Side::new(&world.dir, "c", |c| c.receive_from = super::world::nodes("[]")).await;
    let mut request = world.request();
    request.node = format!("c@{}", c.address());
    let live = source::begin(&world.a.node, &request).await.unwrap();
    said += &format!("{:?}", end(&live).await);

    // It has heard both ends, and every fate.
    let logged = log.text();
    for heard in
        ["at its most talkative", "arrived", "departed", "offer refused", "no luck", "in doubt"]
    {
        assert!(logged.contains(heard) || said.contains(heard), "{heard} was not heard");
    }
    assert!(tickets.len() >= 5);
    let tickets = tickets.iter().map(|ticket| ticket.as_str());
    for secret in tickets.chain([CANARY, "PRIVATE KEY"]) {
        for (what, text) in [("the log", &logged), ("an error or a record", &said)] {
            if let Some(at) = text.find(secret) {
                let shown = &text[at.saturating_sub(300)..(at + 100).min(text.len())];
                panic!("{what} shows {secret}: {}", shown.escape_debug());
            }
        }
    }
}

/// What the command line is told.
async fn told(side: &Side) -> String {
    let socket = side.node.places.runtime.join("agent.sock");
    let client = Client::connect(&format!("unix://{}", socket.display())).await.unwrap();
    let client = AgentClient::new(client);
    let within = || context::with_timeout(0);
    let list = client.list(within(), &ListRequest::default()).await.unwrap();
    let status = client.status(within(), &StatusRequest::default()).await.unwrap();
    format!("{list:?} {status:?}\n")
}

/// What a peer is told of specs that cannot be read.
fn malformed() -> String {
    let good = offer::tests::offer();
    let specs = [r#""canary-of-a-spec""#, r#"{"a": canary-of-a-spec}"#, r#"{"a": "canary-of"#];
    let offers = specs.map(|spec| {
        let mut bad: Offer = good.clone();
        let value = spec.as_bytes().to_vec().into();
        bad.record.as_mut().unwrap().spec = Some(Any { type_url: "spec".into(), value });
        bad
    });
    offers.into_iter().map(|bad| format!("{:?}\n", offer::check(bad).unwrap_err())).collect()
}

fn written(dir: &Path, into: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => written(&path, into),
            false => into.push_str(&String::from_utf8_lossy(&fs::read(path).unwrap())),
        }
    }
}

/// ttrpc logs whole messages, byte by byte: not even then.
#[test]
fn messages_between_agent_and_shim_are_not_logged_at_any_level() {
    let log = Log::default();
    let writer = log.clone();
    let _heard =
        logging::to(move || writer.clone(), false, Some("trace,ttrpc=trace")).set_default();
    trace!(target: "ttrpc::asynchronous::connection", "the bytes of a message");
    debug!(target: "ttrpc::asynchronous::client", "a header");
    trace!("our own");
    let logged = log.text();
    assert!(!logged.contains("the bytes") && logged.contains("header") && logged.contains("own"));
}
