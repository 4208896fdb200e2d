//! Two nodes, and a cable between them that can be cut.

use std::{sync::Arc, time::Duration};

use tempfile::TempDir;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    time,
};
use tokio_util::sync::CancellationToken;
use transship_api::{control::MigrateRequest, session::Host};
use transship_types::ContainerKey;

use super::fake::{Fake, FakeDaemon, FakeShims, RUNTIME};
use crate::{
    access::Nodes,
    authority,
    book::{End, Ending, Live, Role},
    config::Config,
    daemon::TaskStatus,
    failure::Failure,
    node::{Node, Places},
    serve::{self, Serving},
    source,
};

pub const SPEC: &str = r#"{"linux":{"namespaces":[{"type":"network"}]}}"#;
pub const IMAGE: &str = "example.org/redis:1";

pub struct Side {
    pub fake: Arc<Fake>,
    pub node: Arc<Node>,
    pub serving: Option<Serving>,
}

pub struct World {
    pub dir: TempDir,
    pub a: Side,
    pub b: Side,
    pub cable: Cable,
    pub key: ContainerKey,
}

/// A list of nodes as the configuration gives it.
pub fn nodes(list: &str) -> Nodes {
    let config: Config = toml::from_str(&format!("receive_from = {list}")).unwrap();
    config.receive_from
}

pub fn host() -> Host {
    Host {
        kernel: "6.12.0".into(),
        architecture: "x86_64".into(),
        criu: "4.2.1".into(),
        criu_version: 40201,
        page_size: 4096,
        cgroup_version: 2,
        ..Default::default()
    }
}

impl World {
    /// A container runs on `a`; `b` lacks its image.
    pub async fn new() -> World {
        let dir = TempDir::new().unwrap();
        authority::init(&dir.path().join("ca")).unwrap();
        let a = Side::new(&dir, "a", |_| {}).await;
        let b = Side::new(&dir, "b", |_| {}).await;
        let key = ContainerKey::new("default", "redis").unwrap();
        a.fake.add_image(IMAGE, &[b"manifest", &[1; 2500], &[2; 10]]);
        a.fake.run(&key, IMAGE, SPEC);
        let cable = Cable::to(b.address()).await;
        World { dir, a, b, cable, key }
    }

    pub fn request(&self) -> MigrateRequest {
        MigrateRequest {
            namespace: self.key.namespace().into(),
            container: self.key.id().into(),
            node: format!("b@{}", self.cable.address),
            ..Default::default()
        }
    }

    /// One whose source was cut off after its commit, and `b` was told to run
    /// it: in doubt on `a`, which cannot reach `b`.
    pub async fn in_doubt() -> (Self, Arc<Live>) {
        let world = Self::new().await;
        world.a.fake.hold("committed");
        world.b.fake.hold("running");
        let live = world.begin().await.unwrap();
        world.b.fake.until("running").await;
        world.a.fake.until("committed").await;
        world.cable.reroute("127.0.0.1:1".into());
        world.cable.cut();
        world.a.fake.release("committed");
        world.b.fake.release("running");
        live.watch().wait_for(|v| v.in_doubt).await.unwrap();
        (world, live)
    }

    pub async fn begin(&self) -> Result<Arc<Live>, Failure> {
        source::begin(&self.a.node, &self.request()).await
    }

    pub async fn migrate(&self) -> End {
        match self.begin().await {
            Ok(live) => end(&live).await,
            Err(Failure(refusals)) => {
                End::Failed { refusals, ending: Ending::StayedHome, outcome: String::new() }
            }
        }
    }

    /// Where it runs: never on two nodes, and what a test has to find.
    pub fn runs_on(&self) -> &'static str {
        let on = |side: &Side| side.fake.status(&self.key) == Some(TaskStatus::Running);
        match (on(&self.a), on(&self.b)) {
            (true, true) => "both",
            (true, false) => "a",
            (false, true) => "b",
            (false, false) => "none",
        }
    }

    /// Nothing of the arrival is left on `b`, and its book says so.
    pub async fn nothing_left(&self) {
        let clean = || {
            let state = self.b.fake.state();
            let gone = state.containers.is_empty() && state.leases.is_empty();
            let records = self.b.node.book.records();
            gone && state.blobs.is_empty() && records.iter().all(|r| r.ending == Ending::Discarded)
        };
        eventually("b is clean", clean).await;
    }

    /// The arrival's end as `b` wrote it down.
    pub fn at_target(&self) -> Option<Ending> {
        let records = self.b.node.book.records();
        records.iter().find(|r| r.role == Role::Target).map(|r| r.ending)
    }
}

pub async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            time::sleep(Duration::from_millis(5)).await;
        }
    };
    time::timeout(Duration::from_secs(20), wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

pub async fn end(live: &Live) -> End {
    let mut watch = live.watch();
    let ended = watch.wait_for(|v| v.end.is_some());
    let view = time::timeout(Duration::from_secs(40), ended).await.expect("it ends").unwrap();
    view.end.clone().unwrap()
}

pub fn ending(end: &End) -> (Ending, Vec<transship_types::Code>, String) {
    match end {
        End::Moved(_) => (Ending::Departed, vec![], String::new()),
        End::Failed { refusals, ending, outcome } => {
            (*ending, refusals.iter().map(|r| r.code).collect(), outcome.clone())
        }
    }
}

impl Side {
    pub async fn new(dir: &TempDir, name: &str, change: impl FnOnce(&mut Config)) -> Side {
        let at = dir.path().join(name);
        let fake = Fake::new(at.join("run/arrivals.sock"));
        Self::over(dir, name, fake, change).await
    }

    /// An agent over a daemon that is there already.
    pub async fn over(
        dir: &TempDir,
        name: &str,
        fake: Arc<Fake>,
        change: impl FnOnce(&mut Config),
    ) -> Side {
        let (at, ca) = (dir.path().join(name), dir.path().join("ca"));
        let files = at.join("etc");
        let credentials = match authority::issue(&ca, &name.parse().unwrap(), &files) {
            Ok(made) => made,
            // The agent starts again.
            Err(_) => transship_link::Credentials {
                ca: files.join("ca.pem"),
                certificate: files.join("node.pem"),
                key: files.join("node.key"),
                crl: None,
            },
        };
        let mut config = Config {
            listen: "127.0.0.1:0".into(),
            credentials,
            runtimes: vec![RUNTIME.into()],
            ..Default::default()
        };
        config.limits.memory_reserve_mib = 0;
        change(&mut config);
        let places = Places { runtime: at.join("run"), state: at.join("state") };
        let daemon = Arc::new(FakeDaemon(fake.clone()));
        let shims = Arc::new(FakeShims(fake.clone()));
        let node = Node::new(config, places, daemon, shims).unwrap().on(host());
        let serving = Some(serve::open(node.clone()).await.unwrap());
        Side { fake, node, serving }
    }

    pub fn address(&self) -> String {
        self.serving.as_ref().unwrap().address.to_string()
    }

    pub async fn close(&mut self) {
        self.serving.take().unwrap().close().await;
    }
}

/// Passes TCP on, until it is cut; what connects afterwards passes again.
pub struct Cable {
    pub address: String,
    to: watch::Sender<String>,
    cut: watch::Sender<CancellationToken>,
}

impl Cable {
    async fn to(target: String) -> Cable {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (to, cut) = (watch::Sender::new(target), watch::Sender::new(CancellationToken::new()));
        let (target, cuts) = (to.subscribe(), cut.subscribe());
        tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let (target, cut) = (target.borrow().clone(), cuts.borrow().clone());
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(target).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut near, &mut far) => {}
                        () = cut.cancelled() => {}
                    }
                });
            }
        });
        Cable { address, to, cut }
    }

    /// Cuts every connection there is.
    pub fn cut(&self) {
        self.cut.send_replace(CancellationToken::new()).cancel();
    }

    pub fn reroute(&self, target: String) {
        self.to.send_replace(target);
    }
}
