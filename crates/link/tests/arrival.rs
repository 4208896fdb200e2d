//! From the accepted socket to the shim that waits for it.

mod common;

use std::time::Duration;

use common::{Ca, listen, node, sockets};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    task::JoinHandle,
    time,
};
use transship_link::{
    LinkError, Route,
    arrivals::{Arrivals, CONNECTIONS, wait_at},
    connect_agent, connect_ticket, route, turn_away,
};
use transship_types::{Code, MigrationId, Ticket};

const LONG: Duration = Duration::from_secs(30);

fn ticket() -> Ticket {
    Ticket::from_random([0x5a; 16])
}

struct Agent {
    ca: Ca,
    dir: TempDir,
    arrivals: Arrivals,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Agent {
    /// The agent of node `b`.
    fn start() -> Agent {
        let (ca, dir) = (Ca::new(), TempDir::new().unwrap());
        let arrivals = Arrivals::new(ca.issue("b"));
        let listener = UnixListener::bind(dir.path().join("arrivals.sock")).unwrap();
        let serving = tokio::spawn({
            let arrivals = arrivals.clone();
            async move { arrivals.serve(listener).await }
        });
        Agent { ca, dir, arrivals, serving }
    }

    fn shim(&self) -> JoinHandle<Result<transship_link::arrivals::Arrival, LinkError>> {
        let socket = self.dir.path().join("arrivals.sock");
        tokio::spawn(async move { wait_at(&socket, &ticket(), LONG).await })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// The whole way: peek, hand-over by SCM_RIGHTS, handshake in the shim.
#[tokio::test]
async fn a_connection_reaches_the_shim_unread() {
    let agent = Agent::start();
    let registration = agent.arrivals.register(ticket(), node("a"), LONG);
    let shim = agent.shim();
    registration.shim_waits().await.unwrap();

    let (listener, address) = listen().await;
    let a = agent.ca.trust("a");
    let source =
        tokio::spawn(
            async move { connect_ticket(&a, &address, &node("b"), &ticket()).await.unwrap() },
        );
    let (stream, _) = listener.accept().await.unwrap();
    assert_eq!(route(&stream, &node("b")).await.unwrap(), Route::Ticket(ticket()));
    agent.arrivals.hand_over(&ticket(), stream).await.unwrap();

    let arrival = shim.await.unwrap().unwrap();
    assert_eq!(arrival.peer, node("a"));
    let mut at_b = arrival.accept().await.unwrap();
    let mut at_a = source.await.unwrap();
    assert_eq!((&at_a.peer, &at_b.peer), (&node("b"), &node("a")));
    at_a.writer.data(b"pages").await.unwrap();
    assert_eq!(at_b.reader.data().await.unwrap().unwrap(), &b"pages"[..]);

    // Single use, unless the shim asks again.
    let stray = sockets().await.0;
    time::pause();
    let again = agent.arrivals.hand_over(&ticket(), stray).await;
    assert_eq!(again.unwrap_err().code(), Code::Cancelled);
}

/// Each in its own runtime, as lanes have it, and told apart by what they say.
#[tokio::test]
async fn a_shim_that_asks_again_gets_the_next_connection() {
    let agent = Agent::start();
    let _registration = agent.arrivals.register(ticket(), node("a"), LONG);
    let (listener, address) = listen().await;
    for number in 0..3_u8 {
        let shim = agent.shim();
        let (a, address) = (agent.ca.trust("a"), address.clone());
        let source = tokio::spawn(async move {
            let mut channel = connect_ticket(&a, &address, &node("b"), &ticket()).await.unwrap();
            channel.writer.data(&[number]).await.unwrap();
            channel.writer.flush().await.unwrap();
            channel
        });
        let (stream, _) = listener.accept().await.unwrap();
        agent.arrivals.hand_over(&ticket(), stream).await.unwrap();
        let arrival = shim.await.unwrap().unwrap();
        let lane = std::thread::spawn(move || {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_all().build().unwrap().block_on(async {
                let mut channel = arrival.accept().await.unwrap();
                channel.reader.data().await.unwrap().unwrap()
            })
        });
        source.await.unwrap();
        assert_eq!(lane.join().unwrap(), &[number][..]);
    }
}

#[tokio::test]
async fn a_ticket_is_used_up() {
    let agent = Agent::start();
    let _registration = agent.arrivals.register(ticket(), node("a"), LONG);
    for _ in 0..CONNECTIONS {
        let shim = agent.shim();
        agent.arrivals.hand_over(&ticket(), sockets().await.0).await.unwrap();
        shim.await.unwrap().unwrap();
    }
    let _shim = agent.shim();
    let error = agent.arrivals.hand_over(&ticket(), sockets().await.0).await.unwrap_err();
    assert!(matches!(&error, LinkError::Arrival(why) if why.contains("used up")), "{error}");
}

/// Two connections and one shim: the second waits for it to ask again.
#[tokio::test]
async fn connections_wait_for_their_turn() {
    let agent = Agent::start();
    let _registration = agent.arrivals.register(ticket(), node("a"), LONG);
    let both = async {
        let (one, two) = (sockets().await.0, sockets().await.0);
        let ticket = ticket();
        let (one, two) = tokio::join!(
            agent.arrivals.hand_over(&ticket, one),
            agent.arrivals.hand_over(&ticket, two)
        );
        one.and(two).unwrap();
    };
    let shims = async {
        for _ in 0..2 {
            agent.shim().await.unwrap().unwrap();
        }
    };
    tokio::join!(both, shims);
}

#[tokio::test]
async fn a_ticket_of_one_node_is_of_no_use_to_another() {
    let agent = Agent::start();
    let _registration = agent.arrivals.register(ticket(), node("a"), LONG);
    let shim = agent.shim();
    let (listener, address) = listen().await;
    let c = agent.ca.trust("c");
    let thief =
        tokio::spawn(async move { connect_ticket(&c, &address, &node("b"), &ticket()).await });
    let (stream, _) = listener.accept().await.unwrap();
    agent.arrivals.hand_over(&ticket(), stream).await.unwrap();
    let error = shim.await.unwrap().unwrap().accept().await.unwrap_err();
    assert_eq!(error.code(), Code::NotTrusted, "{error}");
    let _ = thief.await.unwrap();
}

#[tokio::test]
async fn the_shim_hears_for_whom_and_for_what_the_ticket_is() {
    let agent = Agent::start();
    let migration = MigrationId::from_random([9; 16]);
    let registration = agent.arrivals.register(ticket(), node("a"), LONG);
    let _registration = registration.bound_to(migration.clone());
    let shim = agent.shim();
    agent.arrivals.hand_over(&ticket(), sockets().await.0).await.unwrap();
    let arrival = shim.await.unwrap().unwrap();
    assert_eq!((arrival.peer, arrival.migration), (node("a"), Some(migration)));
}

/// One ticket does not open what waits under another.
#[tokio::test]
async fn a_ticket_leads_to_its_own_shim_only() {
    let agent = Agent::start();
    let other = Ticket::from_random([0xa5; 16]);
    let waiting = agent.arrivals.register(ticket(), node("a"), LONG);
    let _other = agent.arrivals.register(other.clone(), node("c"), LONG);
    let shim = agent.shim();
    waiting.shim_waits().await.unwrap();
    let stream = sockets().await.0;
    let handing = agent.arrivals.hand_over(&other, stream);
    assert!(time::timeout(Duration::from_millis(50), handing).await.is_err());
    assert!(!shim.is_finished());
    shim.abort();
}

#[tokio::test]
async fn an_agents_connection_is_for_the_agent() {
    let ca = Ca::new();
    let (listener, address) = listen().await;
    let (a, b) = (ca.trust("a"), node("b"));
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        assert_eq!(route(&stream, &node("b")).await.unwrap(), Route::Agent);
        // Nothing was taken off the socket: the handshake still works.
        transship_link::accept(&ca.trust("b"), stream).await.unwrap()
    };
    let (at_a, at_b) = tokio::join!(connect_agent(&a, &address, &b), serve);
    assert_eq!((at_a.unwrap().peer, at_b.peer), (node("b"), node("a")));
}

#[tokio::test]
async fn a_name_that_is_not_served_here_is_refused() {
    let ca = Ca::new();
    let (listener, address) = listen().await;
    let a = ca.trust("a");
    let call = tokio::spawn(async move { connect_agent(&a, &address, &node("c")).await });
    let (stream, _) = listener.accept().await.unwrap();
    let error = route(&stream, &node("b")).await.unwrap_err();
    assert_eq!(error.code(), Code::Protocol, "{error}");
    turn_away(stream).await;
    let error = call.await.unwrap().unwrap_err();
    assert!(matches!(error, LinkError::Name { .. }), "{error:?}");
}

#[tokio::test]
async fn what_is_no_hello_is_refused_at_once() {
    let here = node("b");
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 64], &[0xff; 4096]] {
        let (mut peer, stream) = sockets().await;
        peer.write_all(bytes).await.unwrap();
        let error = route(&stream, &here).await.unwrap_err();
        assert_eq!(error.code(), Code::Protocol, "{error}");
    }
}

/// A record that claims to be long and never ends must not be waited for
/// beyond the limit.
#[tokio::test]
async fn an_endless_hello_is_refused() {
    let (mut peer, stream) = sockets().await;
    // Handshake record of 16 KiB, ClientHello of 16 KiB less its header.
    let mut hello = vec![0x16, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3];
    hello.resize(8192, 0);
    peer.write_all(&hello).await.unwrap();
    let error = route(&stream, &node("b")).await.unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
}

#[tokio::test]
async fn a_peer_that_leaves_is_not_waited_for() {
    let (mut peer, stream) = sockets().await;
    peer.write_all(&[0x16, 3, 1]).await.unwrap();
    drop(peer);
    let error = time::timeout(Duration::from_secs(2), route(&stream, &node("b")))
        .await
        .expect("no waiting")
        .unwrap_err();
    assert_eq!(error.code(), Code::Protocol, "{error}");
}

/// One byte a second, as a slow-loris attack sends them.
#[tokio::test(start_paused = true)]
async fn a_dripping_hello_meets_the_deadline() {
    let (mut peer, stream) = sockets().await;
    let drip = async {
        for byte in [0x16, 3, 1, 0, 200].into_iter().chain([0; 55]) {
            peer.write_all(&[byte]).await.unwrap();
            time::sleep(Duration::from_secs(1)).await;
        }
    };
    let here = node("b");
    tokio::select! {
        got = route(&stream, &here) => assert_eq!(got.unwrap_err().code(), Code::Timeout),
        () = drip => panic!("it waited for a minute"),
    }
}

/// A hello in pieces is as good as a hello.
#[tokio::test]
async fn a_hello_in_two_pieces_is_understood() {
    let ca = Ca::new();
    let (listener, address) = listen().await;
    let a = ca.trust("a");
    let calling = tokio::spawn(async move { connect_agent(&a, &address, &node("b")).await });
    // Take a real hello and send it on in pieces over another connection.
    let (mut from, _) = listener.accept().await.unwrap();
    let mut hello = vec![0; 4096];
    let n = from.read(&mut hello).await.unwrap();
    let (mut peer, stream) = sockets().await;
    let pieces = async {
        for piece in hello[..n].chunks(50) {
            peer.write_all(piece).await.unwrap();
            peer.flush().await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    let here = node("b");
    let (got, ()) = tokio::join!(route(&stream, &here), pieces);
    assert_eq!(got.unwrap(), Route::Agent);
    calling.abort();
}

#[tokio::test]
async fn an_unknown_ticket_is_refused_to_both() {
    let agent = Agent::start();
    let error = agent.shim().await.unwrap().unwrap_err();
    assert!(matches!(&error, LinkError::Arrival(why) if why.contains("not known")), "{error}");
    let error = agent.arrivals.hand_over(&ticket(), sockets().await.0).await.unwrap_err();
    assert_eq!(error.code(), Code::Cancelled);
}

#[tokio::test(start_paused = true)]
async fn a_ticket_expires() {
    let agent = Agent::start();
    let _registration = agent.arrivals.register(ticket(), node("a"), LONG);
    time::advance(LONG).await;
    let error = agent.shim().await.unwrap().unwrap_err();
    assert!(matches!(&error, LinkError::Arrival(why) if why.contains("expired")), "{error}");
    let error = agent.arrivals.hand_over(&ticket(), sockets().await.0).await.unwrap_err();
    assert!(matches!(&error, LinkError::Arrival(why) if why.contains("expired")), "{error}");
}

/// Nor one that a shim waited for in time.
#[tokio::test(start_paused = true)]
async fn a_ticket_expires_while_its_shim_waits() {
    let agent = Agent::start();
    let registration = agent.arrivals.register(ticket(), node("a"), LONG);
    let _shim = agent.shim();
    registration.shim_waits().await.unwrap();
    time::advance(LONG).await;
    let error = agent.arrivals.hand_over(&ticket(), sockets().await.0).await.unwrap_err();
    assert!(matches!(&error, LinkError::Arrival(why) if why.contains("expired")), "{error}");
}

#[tokio::test]
async fn a_ticket_is_worth_nothing_after_its_arrival() {
    let agent = Agent::start();
    let registration = agent.arrivals.register(ticket(), node("a"), LONG);
    let shim = agent.shim();
    agent.arrivals.hand_over(&ticket(), sockets().await.0).await.unwrap();
    shim.await.unwrap().unwrap();
    drop(registration);
    let error = agent.arrivals.hand_over(&ticket(), sockets().await.0).await.unwrap_err();
    assert!(matches!(&error, LinkError::Arrival(why) if why.contains("not known")), "{error}");
}

#[tokio::test]
async fn a_cancelled_arrival_frees_the_shim() {
    let agent = Agent::start();
    let registration = agent.arrivals.register(ticket(), node("a"), LONG);
    let shim = agent.shim();
    registration.shim_waits().await.unwrap();
    drop(registration);
    let error = shim.await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::Cancelled, "{error}");
}

#[tokio::test]
async fn two_shims_cannot_wait_under_one_ticket() {
    let agent = Agent::start();
    let registration = agent.arrivals.register(ticket(), node("a"), LONG);
    let first = agent.shim();
    registration.shim_waits().await.unwrap();
    let second = agent.shim().await.unwrap().unwrap_err();
    assert_eq!(second.code(), Code::Cancelled, "{second}");
    agent.arrivals.hand_over(&ticket(), sockets().await.0).await.unwrap();
    first.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_shim_may_stop_waiting_and_ask_again() {
    let agent = Agent::start();
    let registration = agent.arrivals.register(ticket(), node("a"), LONG);
    let first = agent.shim();
    registration.shim_waits().await.unwrap();
    first.abort();
    assert!(first.await.is_err());
    let second = agent.shim();
    agent.arrivals.hand_over(&ticket(), sockets().await.0).await.unwrap();
    second.await.unwrap().unwrap();
}

/// The connection may be there before the shim is.
#[tokio::test]
async fn a_connection_waits_for_its_shim() {
    let agent = Agent::start();
    let _registration = agent.arrivals.register(ticket(), node("a"), LONG);
    let stream = sockets().await.0;
    let ticket = ticket();
    let handing = agent.arrivals.hand_over(&ticket, stream);
    tokio::pin!(handing);
    assert!(time::timeout(Duration::from_millis(50), &mut handing).await.is_err());
    let shim = agent.shim();
    handing.await.unwrap();
    shim.await.unwrap().unwrap();
}
