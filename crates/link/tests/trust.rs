//! Who may talk to whom, over real sockets and real TLS.

mod common;

use std::{fs, time::Duration};

use common::{Ca, listen, node};
use rcgen::ExtendedKeyUsagePurpose;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use transship_link::{
    Channel, Credentials, LinkError, Trust, accept, connect_agent, connect_ticket,
};
use transship_types::{Code, Ticket};

/// What each end gets when `client` calls the server as node `asked`.
async fn call(
    client: &Trust,
    server: &Trust,
    asked: &str,
) -> (Result<Channel, LinkError>, Result<Channel, LinkError>) {
    let (listener, address) = listen().await;
    let asked = node(asked);
    let serve = async { accept(server, listener.accept().await.unwrap().0).await };
    tokio::join!(connect_agent(client, &address, &asked), serve)
}

#[tokio::test]
async fn two_nodes_of_one_ca_know_each_other() {
    let ca = Ca::new();
    let (a, b) = (ca.trust("a"), ca.trust("b"));
    assert_eq!(a.node(), &node("a"));
    let (at_a, at_b) = call(&a, &b, "b").await;
    let (mut at_a, mut at_b) = (at_a.unwrap(), at_b.unwrap());
    assert_eq!((&at_a.peer, &at_b.peer), (&node("b"), &node("a")));
    // More than the sockets' buffers hold: both ends must move.
    let mut got = 0;
    let write = async {
        at_a.writer.data(&[7; 16 << 20]).await.unwrap();
        at_a.writer.end_data().await.unwrap();
        at_a.writer.close().await.unwrap();
    };
    let read = async {
        while let Some(piece) = at_b.reader.data().await.unwrap() {
            got += piece.len();
        }
    };
    tokio::join!(write, read);
    assert_eq!(got, 16 << 20);
    assert!(matches!(at_b.reader.next().await, Err(transship_wire::WireError::Closed)));
}

#[tokio::test]
async fn another_ca_is_not_trusted_by_either_end() {
    let (ours, theirs) = (Ca::new(), Ca::new());
    let (at_a, at_b) = call(&ours.trust("a"), &theirs.trust("b"), "b").await;
    let error = at_a.unwrap_err();
    assert!(matches!(error, LinkError::PeerNotTrusted { .. }), "{error:?}");
    let error = at_b.unwrap_err();
    assert!(matches!(error, LinkError::NotTrustedByPeer { .. }), "{error:?}");
}

/// The client believes the server, but not the other way round: it must hear
/// so, although its own handshake was complete.
#[tokio::test]
async fn a_refused_client_hears_why() {
    let (ours, theirs) = (Ca::new(), Ca::new());
    let mut stranger = theirs.issue("a");
    stranger.ca = ours.issue("a").ca;
    let stranger = Trust::load(&stranger).unwrap();
    let (at_a, at_b) = call(&stranger, &ours.trust("b"), "b").await;
    let error = at_a.unwrap_err();
    assert!(matches!(error, LinkError::NotTrustedByPeer { .. }), "{error:?}");
    assert_eq!(error.code(), Code::NotTrusted);
    assert_eq!(at_b.unwrap_err().code(), Code::NotTrusted);
}

/// With the node, the date and the command that helps.
#[tokio::test]
async fn an_expired_certificate_is_refused() {
    let ca = Ca::new();
    let expired = Trust::load(&ca.issue_expired("b")).unwrap();
    let until = expired.until().date().to_string();
    let said = |error: &LinkError, wanted: &[&str]| {
        let (text, remedy) = (error.to_string(), error.remedy());
        for word in wanted {
            assert!(text.contains(word) || remedy.contains(word), "{word}: {text} ({remedy})");
        }
        assert_eq!(error.code(), Code::NotTrusted);
    };
    let (at_a, _) = call(&ca.trust("a"), &expired, "b").await;
    let of_b = ["b at 127.0.0.1", "expired on", &until, "transshipd issue b", "reload"];
    said(&at_a.unwrap_err(), &of_b);

    // Its own: said before anybody is dialled.
    let nobody = connect_agent(&expired, "127.0.0.1:1", &node("a")).await.unwrap_err();
    said(&nobody, &["this node, b,", &until, "transshipd issue b"]);
    assert!(matches!(expired.vet(), Err(LinkError::Expired { .. })));
    ca.trust("b").vet().unwrap();

    // One that dials all the same is refused as well.
    let (listener, address) = listen().await;
    let a = ca.trust("a");
    let serve = async { accept(&a, listener.accept().await.unwrap().0).await };
    let files = ca.issue_expired("b");
    let (_, at_a) = tokio::join!(dial_with(&files, &address, "a"), serve);
    said(&at_a.unwrap_err(), &["127.0.0.1", "expired on", "transshipd issue NODE"]);
}

/// TLS as a node does it, without a node's own precautions.
async fn dial_with(files: &Credentials, address: &str, to: &str) {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&files.ca).unwrap()).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let chain = vec![CertificateDer::from_pem_file(&files.certificate).unwrap()];
    let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .unwrap();
    let name = ServerName::try_from(node(to).agent_dns()).unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let mut stream = connector.connect(name, stream).await.unwrap();
    // A client is done before the server has looked at its certificate.
    let _ = stream.read(&mut [0; 64]).await;
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_by_either_end() {
    let ca = Ca::new();
    let (a, b, c) = (ca.issue("a"), ca.issue("b"), ca.issue("c"));
    let list = Some(ca.revoke("list", &[&b]));
    let [a, c] =
        [a, c].map(|files| Trust::load(&Credentials { crl: list.clone(), ..files }).unwrap());
    // Who is on the list may not know it yet.
    let b = Trust::load(&b).unwrap();
    let (at_a, at_b) = call(&a, &b, "b").await;
    let error = at_a.unwrap_err();
    assert!(matches!(&error, LinkError::Revoked { .. }), "{error:?}");
    assert!(error.to_string().contains("b at 127.0.0.1"), "{error}");
    assert!(error.remedy().contains("transshipd issue b"), "{}", error.remedy());
    assert!(matches!(at_b.unwrap_err(), LinkError::NotTrustedByPeer { .. }));
    let (at_b, at_a) = call(&b, &a, "a").await;
    assert!(matches!(at_b.unwrap_err(), LinkError::NotTrustedByPeer { .. }));
    assert!(matches!(at_a.unwrap_err(), LinkError::Revoked { .. }));
    // Who is not on it is as good as before.
    let (at_a, at_c) = call(&a, &c, "c").await;
    assert_eq!((at_a.unwrap().peer, at_c.unwrap().peer), (node("c"), node("a")));
}

/// A list that says nothing about a certificate must not pass for one that
/// says nothing against it.
#[tokio::test]
async fn a_list_of_another_ca_lets_nobody_in() {
    let (ca, other) = (Ca::new(), Ca::new());
    let list = other.revoke("list", &[]);
    let odd = Trust::load(&Credentials { crl: Some(list.clone()), ..ca.issue("a") }).unwrap();
    assert_eq!(odd.vet().unwrap_err().code(), Code::NotTrusted);
    let (_, at_a) = call(&ca.trust("b"), &odd, "a").await;
    assert!(matches!(at_a.unwrap_err(), LinkError::PeerNotTrusted { .. }));
    fs::write(&list, "no list").unwrap();
    let error = Trust::load(&Credentials { crl: Some(list), ..ca.issue("a") }).unwrap_err();
    assert!(error.to_string().contains("holds no revocation list"), "{error}");
}

#[tokio::test]
async fn another_node_under_the_address_is_refused() {
    let ca = Ca::new();
    let (at_a, _) = call(&ca.trust("a"), &ca.trust("c"), "b").await;
    let error = at_a.unwrap_err();
    assert_eq!(error.code(), Code::NotTrusted, "{error:?}");
}

/// A certificate for serving only must not make a client.
#[tokio::test]
async fn a_server_certificate_is_no_client_certificate() {
    let ca = Ca::new();
    let names = ["a.transship.internal".to_string()];
    let server_only = ca.issue_with("server-only", &names, |p| {
        p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let (_, at_b) = call(&Trust::load(&server_only).unwrap(), &ca.trust("b"), "b").await;
    assert!(matches!(at_b.unwrap_err(), LinkError::PeerNotTrusted { .. }));
}

#[tokio::test]
async fn a_certificate_must_name_exactly_one_node() {
    let ca = Ca::new();
    for names in [
        vec!["example.org".to_string()],
        vec!["a.transship.internal".into(), "b.transship.internal".into()],
        vec!["*.transship.internal".into()],
        vec!["x.a.transship.internal".into()],
    ] {
        let credentials = ca.issue_with("odd", &names, |_| {});
        let error = Trust::load(&credentials).unwrap_err();
        assert!(error.to_string().contains("odd.pem"), "{names:?}: {error}");
    }
}

#[tokio::test]
async fn a_key_must_belong_to_its_certificate() {
    let ca = Ca::new();
    let mut mixed = ca.issue("a");
    mixed.key = ca.issue("b").key;
    let error = Trust::load(&mixed).unwrap_err();
    assert!(error.to_string().contains("b.key"), "{error}");
    fs::write(&mixed.key, "no pem").unwrap();
    assert!(matches!(Trust::load(&mixed), Err(LinkError::Credentials { .. })));
    fs::remove_file(&mixed.key).unwrap();
    assert!(matches!(Trust::load(&mixed), Err(LinkError::Credentials { .. })));
}

/// rustls itself as a client, without a certificate.
#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = Ca::new();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca.issue("b").ca).unwrap()).unwrap();
    let provider = rustls::crypto::ring::default_provider();
    let config = rustls::ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (listener, address) = listen().await;
    let server = ca.trust("b");
    let client = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("b.transship.internal").unwrap();
        let mut tls = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config))
            .connect(name, stream)
            .await
            .unwrap();
        let mut sink = Vec::new();
        tls.read_to_end(&mut sink).await.unwrap_err()
    };
    let serve = async { accept(&server, listener.accept().await.unwrap().0).await };
    let (at_client, at_server) = tokio::join!(client, serve);
    let error = at_server.unwrap_err();
    assert!(matches!(error, LinkError::PeerNotTrusted { .. }), "{error:?}");
    assert!(at_client.to_string().contains("CertificateRequired"), "{at_client}");
}

#[tokio::test]
async fn plain_text_is_told_apart_from_distrust() {
    let ca = Ca::new();
    let (listener, address) = listen().await;
    let plain = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        stream.shutdown().await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    };
    let (trust, b) = (ca.trust("a"), node("b"));
    let (got, ()) = tokio::join!(connect_agent(&trust, &address, &b), plain);
    assert_eq!(got.unwrap_err().code(), Code::Protocol);

    let (listener, address) = listen().await;
    let plain = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    };
    let serve = async { accept(&trust, listener.accept().await.unwrap().0).await };
    let (got, ()) = tokio::join!(serve, plain);
    assert_eq!(got.unwrap_err().code(), Code::Protocol);
}

#[tokio::test]
async fn nobody_there_is_unreachable() {
    let ca = Ca::new();
    let (listener, address) = listen().await;
    drop(listener);
    let (trust, b) = (ca.trust("a"), node("b"));
    let error = connect_agent(&trust, &address, &b).await.unwrap_err();
    assert_eq!(error.code(), Code::Unreachable, "{error:?}");
    let error = connect_agent(&trust, "no such address", &b).await.unwrap_err();
    assert_eq!(error.code(), Code::Unreachable, "{error:?}");
}

/// A peer that takes the connection and says nothing.
#[tokio::test(start_paused = true)]
async fn a_silent_peer_meets_the_deadline() {
    let ca = Ca::new();
    let (listener, address) = listen().await;
    let (trust, b, ticket) = (ca.trust("a"), node("b"), Ticket::from_random([1; 16]));
    let silent = async {
        let held = listener.accept().await.unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(held);
    };
    let call = connect_ticket(&trust, &address, &b, &ticket);
    tokio::select! {
        got = call => assert_eq!(got.unwrap_err().code(), Code::Timeout),
        () = silent => panic!("it waited for a minute"),
    }
}
